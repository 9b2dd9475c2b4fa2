"""A policy as a user names it -> the model."""

from collections.abc import Iterator
from pathlib import Path

from models.specs import ModelRef
from storage.experiments import experiments
from storage.home import home, home_name
from tasks.loading import open_folder


def policy_named(reference: str) -> ModelRef:
    """The model that a user means.

    Args:
        reference: an experiment (the policy that stands), "experiment:2" (what its iteration 2 trained), a digest or
            its beginning, a folder of model files, "fake:<skill>", or a name on the hub, with "@<commit>" behind it.
    Raises:
        ValueError: nothing, or more than one policy, has that name.
    """
    if reference.startswith("fake:"):
        return ModelRef(name=reference)
    if Path(reference).is_dir():
        return open_folder(ModelRef(name=reference))
    found = list(dict.fromkeys(_stored(reference.removeprefix("models/"))))
    if len(found) == 1:
        return found[0]
    if found or reference.count("/") != 1:
        names = ", ".join(policy.identity for policy in found[:5])
        raise ValueError(
            f"{reference!r} names {len(found)} policies in {home_name()}{': ' + names if names else ''}; give "
            "an experiment, experiment:<iteration>, a digest from `ratchet status --json`, a folder or a hub name"
        )
    name, _, revision = reference.partition("@")
    return ModelRef(name=name, revision=revision or None)


def _stored(reference: str) -> Iterator[ModelRef]:
    """Policies of the home's experiments that the reference may mean; else checkpoints whose digest begins so."""
    named, _, number = reference.partition(":")
    known = False
    for experiment in experiments():
        policies = {record.iteration: ModelRef.model_validate(record.policy) for record in experiment.iterations()}
        standing = [record.iteration for record in experiment.iterations() if record.promoted]
        if experiment.name == named and (number or standing):
            known = True
            wanted = int(number) if number.isdigit() else standing[-1] if not number else -1
            yield from [policies[wanted]] if wanted in policies else []
        elif not number:
            begun = [
                one for one in policies.values() if any(d and d.startswith(named) for d in (one.digest, one.adapter))
            ]
            known = known or bool(begun)
            yield from begun
    if not known and named:
        for folder in sorted(home().glob("models/[!.]*")):
            if folder.name.startswith(named):
                yield ModelRef(name=folder.name[:12], digest=folder.name)
