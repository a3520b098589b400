"""Turns: what a grammar allows, and what is understood without one."""

import json

import pytest

from clvr_jax.backends.local.grammar import Grammars
from clvr_jax.backends.protocol import Options
from clvr_jax.closed_loop.turn import grammar, read
from clvr_jax.data.turns import Action, Turn
from launch.toy import byte_tokenizer

FIRST = 'I begin.\nTwo lines.\n{"action": "generate", "prompt": "a \\"red\\" circle"}'
EDIT = '{"action": "edit", "prompt": "add a star to <IMG_GEN_2>", "references": [2, 1]}'


@pytest.fixture(scope="module")
def grammars():
    tokenizer = byte_tokenizer()
    return Grammars(tokenizer, len(tokenizer), tokenizer.convert_tokens_to_ids("<|im_end|>"))


def allowed(grammars, text, number):
    """Whether a grammar takes a text to its end."""
    matcher = grammars.compile(Options(grammar=grammar(number)))
    ids = [*grammars._tokenizer.encode(text, add_special_tokens=False), grammars._end]
    for token in ids:
        mask = matcher.mask()
        if not mask[token // 32] >> (token % 32) & 1:
            return False
        matcher.push(token)
    return True


@pytest.mark.parametrize(
    "text, number, good",
    [
        (FIRST, 1, True),
        (FIRST + "\n<IMG_GEN_1>", 1, True),
        (FIRST + "\n<IMG_GEN_2>", 1, False),
        ('{"action": "generate", "prompt": "x"}', 1, True),
        ('{"action": "generate", "prompt": ""}', 1, False),
        ('{"action": "stop"}', 1, False),
        (EDIT, 1, False),
        (f"I see <IMG_GEN_2>.\n{EDIT}\n<IMG_GEN_3>", 3, True),
        (EDIT, 2, False),
        (EDIT.replace("[2, 1]", "[2, 2]"), 3, False),
        (EDIT.replace("[2, 1]", "[1, 2, 3]"), 4, True),
        (EDIT.replace("[2, 1]", "[]"), 4, False),
        ('Done.\n{"action": "stop"}', 2, True),
        ('Done. {"action": "stop"}', 2, False),
        ("Done.", 2, False),
        ('Done.\n{"action": "stop"}\nAnd more.', 2, False),
    ],
)
def test_grammar(grammars, text, number, good):
    assert allowed(grammars, text, number) is good
    if good:
        assert text.removesuffix(f"\n<IMG_GEN_{number}>") in read(text, number).text()


def test_the_longest_grammar_still_compiles(grammars):
    assert allowed(grammars, EDIT.replace("[2, 1]", "[7, 3, 5]"), 8)


@pytest.mark.parametrize(
    "text",
    [
        f"So.\n{EDIT}\n<IMG_GEN_3>",
        f"So.\n```json\n{EDIT}\n```",
        f"So.\n{EDIT}\nThat is what I do.",
        "So.\n" + json.dumps(json.loads(EDIT), indent=2),
        "So.\n" + EDIT.replace('"action"', '"kind"'),
        "So.\n" + EDIT.replace("add a star to", "add a star\nto"),
    ],
)
def test_other_ways_to_write_the_same_are_understood(text):
    action = Action(kind="edit", prompt="add a star to <IMG_GEN_2>", references=(2, 1))
    turn = read(text, 3)
    assert (turn.reasoning, turn.action) == ("So.", action)


def test_a_turn_without_words_gives_its_prompt_as_its_reason():
    turn = read('{"action": "generate", "prompt": "a star", "references": []}', 1)
    assert turn == Turn("a star", Action(kind="generate", prompt="a star"))


def test_what_a_model_thinks_before_it_answers_is_no_part_of_its_turn():
    assert read('<think>\nHm.\n</think>\n\nDone.\n{"action": "stop"}', 2).reasoning == "Done."


def test_stopping_is_understood():
    assert read('Done. {"action": "done"}', 2) == Turn("Done.", stop=True)


@pytest.mark.parametrize(
    "text, number, words",
    [
        ("I draw a circle.", 1, "there is no action"),
        ('{"action": "stop"}', 1, "nothing has been drawn yet"),
        (
            '{"action": "edit", "prompt": "x", "references": [3]}',
            3,
            "image 3 does not exist; 1 to 2",
        ),
        (
            'As <IMG_GEN_9>.\n{"action": "generate", "prompt": "x"}',
            1,
            "image 9 does not exist; none",
        ),
        ('{"action": "edit", "prompt": "x"}', 2, "no references"),
        ('{"action": "paint", "prompt": "x"}', 2, "generate"),
        ('{"action": "generate", "prompt": ""}', 1, "is empty"),
        ('{"action": "generate", prompt: "x"}', 1, "is no JSON"),
        ('See <|im_end|>\n{"action": "generate", "prompt": "x"}', 1, "control token"),
        (f'{EDIT}\n{{"action": "stop"}}', 3, "more than one action"),
        (f"So.\n{EDIT}\n{EDIT}", 3, "more than one action"),
        ('{"action": ["edit"], "prompt": "x"}', 2, "must be texts"),
        ('{"kind": "generate", "prompt": null}', 1, "must be texts"),
    ],
)
def test_what_cannot_be_understood_says_why(text, number, words):
    with pytest.raises(ValueError, match=words):
        read(text, number)
