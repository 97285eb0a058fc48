"""YAML from a stranger: plain data, bounded work."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

from surgery.errors import first_line

# Python refuses to print numbers that are much longer.
_BITS = 1024


def load(text: str, *, as_the_hub: bool = False) -> Any:
    """The data in a YAML text.

    as_the_hub: `no` is a language, not a truth value, and dates are text. Raises ValueError, with
    one line of reason, for anything but plain data. Aliases are refused: nine lines of them can
    stand for a gigabyte.
    """
    import yaml

    try:
        return yaml.load(text, _loader(as_the_hub))
    except yaml.YAMLError as error:
        raise ValueError(_line(error)) from error
    except (RecursionError, TypeError, OverflowError) as error:
        raise ValueError(type(error).__name__ + ": " + str(error)[:200]) from error


def _line(error: Any) -> str:
    mark = getattr(error, "problem_mark", None)
    problem = str(getattr(error, "problem", None) or "").strip() or first_line(error)
    return f"{problem} (line {mark.line + 1})" if mark else problem


@lru_cache(maxsize=2)
def _loader(as_the_hub: bool) -> Any:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain data only: no aliases, no key twice."""

        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
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
                if twice:
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
