"""The policy view's page: what a browser gets of compared tokens."""

from html.parser import HTMLParser

import pytest

from storage.rows import TokenComparison
from tasks.token_pages import render_page, shown_texts, signed, visible

MINUS = "\N{MINUS SIGN}"


def compared(
    token: str,
    policy: float | None,
    reference: float | None,
    *,
    sequence: int = 0,
    position: int = 0,
    **changes: object,
) -> TokenComparison:
    fields: dict[str, object] = {
        "sequence": sequence,
        "prompt_id": "0123456789abcdef",
        "rollout_index": 3,
        "side": "completion",
        "about": "reward 1",
        "position": position,
        "is_prompt": False,
        "token_id": 7,
        "token": token,
        "policy_logprob": policy,
        "reference_logprob": reference,
        "difference": None if policy is None or reference is None else policy - reference,
        "cut_tokens": 0,
        "policy": "p",
        "reference": "r",
    }
    return TokenComparison(**{**fields, **changes})  # type: ignore[arg-type]


class Tokens(HTMLParser):
    """What a browser makes of the tokens of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.texts: list[str] = []
        self.attributes: list[dict[str, str | None]] = []
        self.tags: list[str] = []
        self._inside = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self._inside = tag == "b" and "data-f" in dict(attrs)
        if self._inside:
            self.attributes.append(dict(attrs))
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside = False

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def page_of(*rows: TokenComparison) -> Tokens:
    return Tokens(render_page(rows, "mine", "theirs", "datasets/token_comparisons/1"))


def test_likelier_tokens_are_green_less_likely_ones_red_and_both_are_clipped() -> None:
    found = page_of(
        compared("a", -0.5, -0.75), compared("b", -1.0, -0.5), compared("c", -0.1, -5.0), compared("d", -1.0, -1.0)
    )
    assert [(one.get("class"), one.get("style")) for one in found.attributes] == [
        ("up", "--a:0.250"),
        ("down", "--a:0.500"),
        ("up", "--a:1.000"),
        (None, None),
    ]


def test_the_prompts_tokens_are_neutral_and_do_not_count() -> None:
    rows = [
        compared("Q", None, None, is_prompt=True),
        compared("?", -1.0, -3.0, is_prompt=True, position=1),
        compared("A", -0.5, -1.0, position=2),
        compared(".", -0.25, -0.125, position=3),
    ]
    (text,) = shown_texts(rows)
    # The completion: -0.75 under the policy and -1.125 under the reference, 0.375 more over 2 tokens.
    assert (text.policy, text.reference, text.difference, text.mean) == (-0.75, -1.125, 0.375, 0.1875)
    assert [token.kind for token in (*text.prompt, *text.completion)] == ["", "", "up", "down"]
    assert len(text.prompt) == 2


def test_text_that_looks_like_a_page_stays_text() -> None:
    nasty = "<script>alert('x')</script> & </b> {{ 7 * 7 }} \" data-f='"
    found = page_of(compared(nasty, -1.0, -2.0, about="<i>known</i>"))
    assert found.texts == [nasty]
    assert (found.tags.count("script"), found.tags.count("i")) == (1, 1)  # the page's own, and the bar
    told = found.attributes[0]["data-f"]
    assert told == f"0|7|{MINUS}1.000  (36.8 %)|{MINUS}2.000  (13.5 %)|+1.000|{nasty!r}"


def test_what_cannot_be_seen_is_made_visible() -> None:
    assert visible("a\nb\tc") == "a↵\nb⇥\tc"
    assert visible("\u202eevil\x00") == "⟨U+202E⟩evil⟨U+0000⟩"
    assert visible("") == "◦"
    assert visible("plain 😀") == "plain 😀"


def test_a_long_prompt_is_folded_and_a_cut_text_says_so() -> None:
    prompt = [compared("q ", -1.0, -1.0, is_prompt=True, position=n, cut_tokens=1200) for n in range(61)]
    page = render_page([*prompt, compared("a", -1.0, -2.0, position=61, cut_tokens=1200)], "mine", "theirs", "x")
    assert "Prompt, 61 tokens" in page and "1,200 more tokens at its end" in page


def test_bars_are_as_long_as_their_totals_are_large() -> None:
    rows = [compared("a", -1.0, -3.0), compared("b", -2.0, -1.0, sequence=1), compared("c", -1.0, -1.0, sequence=2)]
    assert [text.width for text in shown_texts(rows)] == ["100.00", "50.00", "0.00"]


@pytest.mark.parametrize(
    ("value", "text"), [(0.5, "+0.50"), (-0.5, f"{MINUS}0.50"), (0.0, "0.00"), (-0.001, "0.00"), (0.001, "0.00")]
)
def test_a_difference_has_its_sign_and_zero_has_none(value: float, text: str) -> None:
    assert signed(value) == text


def test_a_page_needs_nothing_from_elsewhere() -> None:
    page = render_page([compared("a", -1.0, -2.0)], "mine", "theirs", "x")
    assert not any(word in page for word in ("http://", "https://", "src=", "@import", "url("))
