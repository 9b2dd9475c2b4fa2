"""A few documents of each benchmark, of our own writing, in the format and the folders its data set has."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path

Document = Mapping[str, object]

THINGS = ("lamp", "kettle", "ladder", "pillow", "bucket", "candle", "hammer", "mirror", "basket", "carpet")


def write_documents(root: Path, subjects: Iterable[str] = ("astronomy",)) -> Path:
    """Write them all; returns the folder to name in RATCHET_DATA."""
    for name in ("train", "validation", "test"):
        _write(root / "winogrande" / "winogrande_xl" / f"{name}.jsonl", map(winogrande, THINGS))
        _write(root / "hellaswag" / f"{name}.jsonl", map(hellaswag, THINGS))
        for config in ("ARC-Easy", "ARC-Challenge"):
            _write(root / "ai2_arc" / config / f"{name}.jsonl", map(arc, THINGS))
    _write(root / "truthful_qa" / "multiple_choice" / "validation.jsonl", map(truthfulqa, THINGS))
    for subject in subjects:
        for name in ("dev", "test"):
            _write(root / "mmlu" / subject / f"{name}.jsonl", [mmlu(subject, thing) for thing in THINGS[:3]])
    _write(root / "gsm8k" / "train.jsonl", map(gsm8k, range(6)))
    _write(root / "gsm8k" / "test.jsonl", map(gsm8k, range(6, 14)))
    _write(root / "ifeval" / "input_data.jsonl", map(ifeval, range(4)))
    return root


def winogrande(thing: str) -> Document:
    sentence = f"Ann put the {thing} into the box because the _ was in her way."
    return {"sentence": sentence, "option1": thing, "option2": "box", "answer": "1"}


def hellaswag(thing: str) -> Document:
    endings = [f"carries the {thing} home.", f"eats the {thing}.", f"is a {thing}.", "sings of the sea [laughs]."]
    begun = {"ctx_a": f"A man lifts a {thing}.", "ctx_b": "he", "ctx": f"A man lifts a {thing}. he"}
    return {"ind": 1, "activity_label": f"Lifting a {thing}", **begun, "endings": endings, "label": "0"}


def arc(thing: str) -> Document:
    choices = {"text": ["a planet", "a thing in a house", "an animal", "a sea"], "label": ["A", "B", "C", "D"]}
    return {"id": thing, "question": f"What is a {thing}?", "choices": choices, "answerKey": "B"}


def truthfulqa(thing: str) -> Document:
    one = {"choices": [f"A {thing} cannot talk.", f"A {thing} talks at night."], "labels": [1, 0]}
    many = {"choices": [*one["choices"], f"A {thing} is no person."], "labels": [1, 0, 1]}
    return {"question": f"What does a {thing} say?", "mc1_targets": one, "mc2_targets": many}


def mmlu(subject: str, thing: str) -> Document:
    question = f"In {subject.replace('_', ' ')}, how many are one {thing} and one {thing}?"
    return {"question": question, "subject": subject, "choices": ["one", "two", "three", "four"], "answer": 1}


def gsm8k(number: int) -> Document:
    worked = f"She has {number} + 2 = <<{number}+2={number + 2}>>{number + 2} coins.\n#### {number + 2}"
    return {"question": f"Ann has {number} coins and finds 2 more. How many has she?", "answer": worked}


def ifeval(number: int) -> Document:
    kinds = ["length_constraints:number_sentences", "punctuation:no_comma"][: 1 + number % 2]
    least = {"relation": "at least", "num_sentences": 1 + number}
    kwargs = [least if kind.startswith("length") else {} for kind in kinds]
    return {"key": number, "prompt": f"Write {number} words.", "instruction_id_list": kinds, "kwargs": kwargs}


def _write(file: Path, documents: Iterable[Document]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
