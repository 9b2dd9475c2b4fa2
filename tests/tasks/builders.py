"""Tiny builders of rows: only what a test is about is spelt out."""

from storage.rows import (
    Demonstration,
    EvaluatedPrompt,
    Instance,
    Instruction,
    JudgedRollout,
    Rollout,
    ScoredRollout,
    Verification,
    Verifier,
    VerifierCase,
)


def scored(
    index: int = 0,
    reward: float | None = 1.0,
    *,
    prompt_id: str = "p",
    completion: str | None = None,
    answer: str | None = None,
    finish_reason: str = "stop",
    logprob: float | None = None,
) -> ScoredRollout:
    """A scored rollout; its text is its own unless told."""
    return ScoredRollout(
        prompt_id=prompt_id,
        rollout_index=index,
        prompt=f"prompt {prompt_id}",
        completion=f"completion {index}" if completion is None else completion,
        completion_tokens=5,
        finish_reason=finish_reason,
        cumulative_logprob=logprob,
        policy="fake:tests",
        answer=answer,
        reward=reward,
        reason={1.0: "match", None: "no final answer"}.get(reward, "mismatch"),
        scorer="tests@1",
    )


def rollout(index: int = 0, completion: str = "mine", prompt_id: str = "p", finish_reason: str = "stop") -> Rollout:
    """A rollout nobody has scored."""
    return Rollout(
        prompt_id=prompt_id,
        rollout_index=index,
        prompt=f"prompt {prompt_id}",
        completion=completion,
        prompt_tokens=2,
        completion_tokens=5,
        finish_reason=finish_reason,
        cumulative_logprob=None,
        seed=0,
        policy="fake:tests",
    )


def demonstration(prompt_id: str = "p", completion: str = "human", prompt: str | None = None) -> Demonstration:
    """A human demonstration."""
    return Demonstration(
        task="solve",
        prompt_id=prompt_id,
        rollout_index=None,
        iteration=0,
        prompt=f"prompt {prompt_id}" if prompt is None else prompt,
        completion=completion,
        reward=None,
        source="tests",
    )


def evaluated(prompt_id: str, value: float, strategy: str = "mean@1") -> EvaluatedPrompt:
    """What a strategy scored on one prompt."""
    return EvaluatedPrompt(
        prompt_id=prompt_id, strategy=strategy, value=value, rollouts=4, k=1, undecided=0, answer=None
    )


def instruction(text: str = "End with Bye.", query_id: str = "q") -> Instruction:
    """An instruction, whose id is its text."""
    return Instruction(
        instruction_id=text,
        instruction=text,
        query_id=query_id,
        query=f"query {query_id}",
        evaluation_types=[],
        writer="fake:tests",
    )


def verifier(name: str, instruction_id: str = "i") -> Verifier:
    """A verifier that nobody runs."""
    return Verifier(verifier_id=name, instruction_id=instruction_id, source=f"# {name}", writer="fake:tests")


def case(response: str, *, expected: bool, instruction_id: str = "i") -> VerifierCase:
    """A made-up response."""
    return VerifierCase(instruction_id=instruction_id, response=response, expected=expected, writer="fake:tests")


def instance(prompt_id: str = "p", instruction_id: str = "i", split: str = "train") -> Instance:
    """A query with an instruction."""
    return Instance(
        prompt_id=prompt_id,
        instruction_id=instruction_id,
        query_id="q",
        prompt=f"prompt {prompt_id}",
        query="query",
        instruction=f"instruction {instruction_id}",
        split=split,
    )


def verification(verifier_id: str, outcome: str, index: int = 0, prompt_id: str = "p") -> Verification:
    """One verifier's word on one completion."""
    return Verification(
        prompt_id=prompt_id,
        rollout_index=index,
        verifier_id=verifier_id,
        outcome=outcome,
        detail="",
        shown=False,
        isolation="tests",
    )


def judged(
    index: int, answer: str | None, sure: float | None, *, prompt_id: str = "p", finish_reason: str = "stop"
) -> JudgedRollout:
    """A judged rollout; its text is its own."""
    return JudgedRollout(
        prompt_id=prompt_id,
        rollout_index=index,
        prompt=f"prompt {prompt_id}",
        completion=f"completion {index}",
        completion_tokens=5,
        finish_reason=finish_reason,
        cumulative_logprob=None,
        policy="fake:tests",
        answer=answer,
        confidence=sure,
        positive_logprob=None,
        negative_logprob=None,
        judge="fake:tests",
        reason="judged",
    )


def both(
    answer: str | None, reward: float | None, sure: float | None, index: int
) -> tuple[ScoredRollout, JudgedRollout]:
    """A rollout scored and judged."""
    return scored(index, reward, answer=answer), judged(index, answer, sure)
