"""Actions written as one XML element between answer tags, read strictly and at bounded cost.

Environments whose actions have structure (an expression, a list of points) ask for exactly one XML element
inside ``<answer>`` and ``</answer>``. The element becomes plain strings, maps and lists; what they mean is
the environment's business. The text comes from a model, so everything XML offers beyond elements, attributes,
text and the predefined entities is refused before a parser sees it: no declarations, document types (and with
them no entity definitions), comments, CDATA sections or processing instructions. Length, depth and number of
elements have ceilings, so any text whatsoever is answered in time linear in its length.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET
from typing import Any

from cod_async.errors import CodError
from cod_async.lifecycle.parsing import extract_between

ANSWER_START = "<answer>"
ANSWER_END = "</answer>"
MAX_ANSWER_CHARS = 20_000
"""Longest text between the answer tags, in characters."""
MAX_DEPTH = 32
"""Deepest nesting of elements; the root has depth 1."""
MAX_ELEMENTS = 1_000
"""Most elements of an action."""


class ActionParseError(CodError):
    """A response holds no readable action; the message says why, in words fit for the policy."""


class AnswerTagError(ActionParseError):
    """The response does not have exactly one opening and one closing answer tag, in this order."""


class InvalidXmlError(ActionParseError):
    """What stands between the answer tags is not one well-formed XML element within the limits."""


def parse_action(response: str, list_tags: frozenset[str]) -> tuple[str, Any]:
    """Read the action of a response.

    The value of an element is, recursively:

    ===================================  ==============================================================
    without children, with attributes    map of its attributes; its text is ignored
    without children and attributes      its text without surrounding white space
    with children, tag in ``list_tags``  list of the children's values; their tags and its attributes are
                                         ignored
    with children otherwise              map of attributes and children by name; a name that occurs more
                                         than once has the list of its values, attribute first
    ===================================  ==============================================================

    Args:
        response: the policy's text, of any length and content.
        list_tags: tags whose children form a list.

    Returns:
        The root's tag and its value: a string, map or list; an empty string becomes an empty map.

    Raises:
        AnswerTagError: not exactly one pair of answer tags.
        InvalidXmlError: not one well-formed element, text mixed with children, a forbidden construct, or a
            limit of this module exceeded.
    """
    content = extract_between(response, ANSWER_START, ANSWER_END)
    if content is None:
        raise AnswerTagError(f"expected exactly one {ANSWER_START}...{ANSWER_END} block")
    root = _element(content)
    value = _value(root, list_tags)
    return root.tag, {} if value == "" else value


class _BoundedBuilder(ET.TreeBuilder):
    """Builds a tree and stops the parser as soon as it grows too deep or too large."""

    def __init__(self) -> None:
        super().__init__()
        self._depth = 0
        self._num_elements = 0

    def start(self, tag: str, attrs: dict[str, str], /) -> ET.Element:
        self._depth += 1
        self._num_elements += 1
        if self._depth > MAX_DEPTH:
            raise InvalidXmlError(f"invalid XML: elements are nested more than {MAX_DEPTH} deep")
        if self._num_elements > MAX_ELEMENTS:
            raise InvalidXmlError(f"invalid XML: more than {MAX_ELEMENTS} elements")
        return super().start(tag, attrs)

    def end(self, tag: str, /) -> ET.Element:
        self._depth -= 1
        return super().end(tag)


def _element(content: str) -> ET.Element:
    """Parse the text between the answer tags."""
    if len(content) > MAX_ANSWER_CHARS:
        raise InvalidXmlError(f"invalid XML: the answer is longer than {MAX_ANSWER_CHARS} characters")
    for mark in ("<!", "<?"):
        if mark in content:
            raise InvalidXmlError(f"invalid XML: {mark} is not allowed; use plain elements and attributes")
    parser = ET.XMLParser(target=_BoundedBuilder())  # noqa: S314 - no `<!`, so no entities to expand
    try:
        parser.feed(content.strip())
        root: ET.Element = parser.close()
    except (ET.ParseError, UnicodeError, ValueError) as error:  # the last two: surrogates, NUL characters
        raise InvalidXmlError(f"invalid XML: {error}") from None
    return root


def _value(element: ET.Element, list_tags: frozenset[str]) -> Any:
    """Return the value of an element; recursion is bounded by :data:`MAX_DEPTH`."""
    if len(element) == 0:
        return dict(element.attrib) if element.attrib else (element.text or "").strip()
    if any((text or "").strip() for text in (element.text, *(child.tail for child in element))):
        raise InvalidXmlError(f"invalid XML: <{element.tag}> mixes text with elements")
    if element.tag in list_tags:
        return [_value(child, list_tags) for child in element]
    named: dict[str, list[Any]] = {name: [value] for name, value in element.attrib.items()}
    for child in element:
        named.setdefault(child.tag, []).append(_value(child, list_tags))
    return {name: values[0] if len(values) == 1 else values for name, values in named.items()}
