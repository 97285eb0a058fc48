"""YAML from a stranger: plain data, bounded work."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from surgery.errors import first_line

# Python refuses to print numbers that are much longer.
_BITS = 1024
# Values that the metadata of a card may have, its aliases spelled out.
_MOST = 100_000


def load(text: str, *, as_the_hub: bool = False, lenient: bool = False) -> Any:
    """The data in a YAML text.

    Args:
        text: Of a stranger.
        as_the_hub: `no` is a language, not a truth value, and dates are text.
        lenient: Of a key that appears twice the last counts, and aliases are followed as long as
            they stand for little. Otherwise both are refused: nine lines of aliases can stand for a
            gigabyte.

    Raises:
        ValueError: With one line of reason, for anything but plain data.
    """
    import yaml

    try:
        loaded = yaml.load(text, _loader(as_the_hub, lenient))
        return _spelled_out(loaded, [_MOST]) if lenient else loaded
    except yaml.YAMLError as error:
        raise ValueError(_line(error)) from error
    except (RecursionError, TypeError, OverflowError) as error:
        raise ValueError(type(error).__name__ + ": " + str(error)[:200]) from error


def _line(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or "").strip() or first_line(error)
    return f"{problem} (line {mark.line + 1})" if mark else problem


def _spelled_out(value: Any, left: list[int]) -> Any:
    """Data in which nothing is shared; ValueError where it stands for more than is `left`."""
    left[0] -= 1
    if left[0] < 0:
        raise ValueError("its aliases stand for too much")
    if isinstance(value, dict):
        return {key: _spelled_out(part, left) for key, part in value.items()}
    if isinstance(value, list):
        return [_spelled_out(part, left) for part in value]
    return value


@lru_cache(maxsize=4)
def _loader(as_the_hub: bool, lenient: bool) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain data only: no aliases, no key twice."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if not lenient and self.check_event(yaml.AliasEvent):
                event = self.peek_event()
                raise yaml.YAMLError(f"aliases such as *{event.anchor} are not read")
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            seen: set[Any] = set()
            for key_node, _ in node.value:
                key = self.construct_object(key_node, deep=True)
                try:
                    twice = key in seen
                except TypeError as error:
                    raise yaml.YAMLError("a key is no plain value") from error
                if twice and not lenient:
                    raise yaml.YAMLError(f"the key {key!r} appears twice")
                seen.add(key)
            return super().construct_mapping(node, deep=deep)

        def bounded(self, node: Any) -> int:
            value: int = self.construct_yaml_int(node)
            if value.bit_length() > _BITS:
                raise yaml.YAMLError(f"a number of {value.bit_length()} bits is no setting")
            return value

    Loader.add_constructor("tag:yaml.org,2002:int", Loader.bounded)
    if as_the_hub:
        Loader.yaml_implicit_resolvers = {
            first: [
                (tag, pattern)
                for tag, pattern in resolvers
                if tag != "tag:yaml.org,2002:timestamp"
                and not (tag == "tag:yaml.org,2002:bool" and first not in "tTfF")
            ]
            for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }
    return Loader
