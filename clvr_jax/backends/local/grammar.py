"""Token masks for text that must follow a JSON schema or a grammar (llguidance)."""

import functools
import json
from typing import Any

import numpy as np

from clvr_jax.backends.protocol import InvalidRequest, Options

# between the parts of JSON; without a bound a weak model may write spaces to the end
_SPACES = {"whitespace_pattern": r"[ \n]{0,16}"}


class Grammars:
    """What makes matchers for one tokenizer.

    Args:
      tokenizer: a fast Hugging Face tokenizer.
      vocab: rows of the model's scores, which may be more than the tokenizer knows.
      end: the token that closes a turn.
    """

    def __init__(self, tokenizer: Any, vocab: int, end: int):
        self._tokenizer, self._vocab, self._end = tokenizer, vocab, end

    @functools.cached_property
    def tokens(self) -> Any:
        """llguidance's view of the vocabulary: a second of work for a large one, done once."""
        import llguidance.hf

        return llguidance.hf.from_tokenizer(
            self._tokenizer, n_vocab=self._vocab, eos_token=self._end
        )

    def compile(self, options: Options) -> "Matcher | None":
        """Return a matcher of what the options ask for, None for free text.

        Raises:
          InvalidRequest: the schema or grammar is broken.
        """
        import llguidance

        if options.schema is None and options.grammar is None:
            return None
        if options.schema is not None:
            kind, text = "schema", _dump(options.schema)
            make = functools.partial(
                llguidance.LLMatcher.grammar_from_json_schema, defaults=_SPACES
            )
        else:
            kind, text = "grammar", options.grammar
            make = llguidance.LLMatcher.grammar_from_lark
        try:
            grammar = make(text)
        except ValueError as error:
            raise InvalidRequest(f"the {kind} cannot be used: {error}") from error
        matcher = llguidance.LLMatcher(self.tokens, grammar)
        if matcher.is_error():
            raise InvalidRequest(f"the {kind} cannot be used: {matcher.get_error()}")
        return Matcher(matcher, self._vocab)

    def raw(self, token: int) -> bytes:
        """Return the bytes of a token; none for rows of the head beyond the vocabulary."""
        if token >= len(self._tokenizer):
            return b""
        return self.tokens.decode_bytes([token])


class Matcher:
    """Where a turn stands in its grammar."""

    def __init__(self, matcher: Any, vocab: int):
        self._matcher = matcher
        self._words = -(-vocab // 32)

    def mask(self) -> np.ndarray:
        """Return one row of bits: which tokens may come next (`sampling.sample`).

        Raises:
          RuntimeError: llguidance gave up on the grammar, e.g. because it is too large.
        """
        from llguidance.numpy import fill_next_token_bitmask

        out = np.zeros((1, self._words), np.int32)
        fill_next_token_bitmask(self._matcher, out)
        if self._matcher.is_error():  # its mask would end the turn as if the text were complete
            raise RuntimeError(f"the grammar cannot go on: {self._matcher.get_error()}")
        return out[0]

    def push(self, token: int) -> None:
        """Take the token that was chosen under the mask.

        Raises:
          RuntimeError: the grammar does not allow it, or llguidance gave up on the grammar.
        """
        if not self._matcher.consume_token(token):
            raise RuntimeError(f"the grammar cannot go on: {self._matcher.get_error()}")


def _dump(schema: Any) -> str:
    try:
        return json.dumps(dict(schema))
    except TypeError as error:
        raise InvalidRequest(f"the schema cannot be used: {error}") from error


def free(rows: int, vocab: int) -> np.ndarray:
    """Return masks that allow every token."""
    return np.full((rows, -(-vocab // 32)), -1, np.int32)
