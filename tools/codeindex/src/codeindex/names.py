"""Where each name is defined and which files use it."""

from __future__ import annotations

import re
from array import array
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Mapping

from codeindex.facts import DOCUMENTS, Definition, Facts
from codeindex.graph import FAMILIES, Graph

_LOOSE = ("Go", "Java", "Shell")  # languages whose files can call each other's methods without an import


_PARAMETERS = re.compile(r"<[^<>]*>")


def simple(definition: Definition) -> str:
    """The name under which a definition is looked up."""
    whole = definition.kind in ("heading", "module") and "::" not in definition.name
    return definition.name if whole else simple_name(definition.name)


def simple_name(name: str) -> str:
    """The last part of a name with scopes.

    Example:
        >>> simple_name("Class.method"), simple_name("ns::Class<T>::method"), simple_name('files."a.py"')
        ('method', 'method', 'a.py')
    """
    if name.endswith('"') and len(name) > 1:  # a key with a dot in it
        return name[name.rfind('"', 0, -1) + 1 : -1]
    operator = re.search(r"(?:^|::)(operator\W.*)", name)
    if operator:
        return operator[1]
    name = without_parameters(name)
    return name.rpartition("::")[2].rpartition(".")[2] or name


def without_parameters(name: str) -> str:
    """A name without the types that it is made for.

    Example:
        >>> without_parameters("Box<Pair<A, B>>::open")
        'Box::open'
    """
    while "<" in name and (shorter := _PARAMETERS.sub("", name)) != name:
        name = shorter
    return name


class Names:
    """The files that use a name.

    A file *uses* a definition if it mentions its name and imports the file that defines it (itself or through a package
    that hands the name on). Where names need no import, as in C and Go, it also does if no other file of its language
    defines the name. Documents use what they set as code, a method with its class, if one file alone defines it.
    """

    def __init__(self, facts: Mapping[str, Facts], graph: Graph) -> None:
        self._graph = graph
        self._paths = list(facts)
        self._numbers = {path: number for number, path in enumerate(self._paths)}
        self._languages = [FAMILIES.get(own.language, own.language) for own in facts.values()]
        self._definers: dict[str, set[int]] = defaultdict(set)
        for number, own in enumerate(facts.values()):
            for each in own.definitions:
                if _can_be_used(each):
                    self._definers[simple(each)].add(number)
        self._mentions: dict[str, array[int]] = {}  # sorted numbers of files
        for number, own in enumerate(facts.values()):
            for name in own.mentions:
                if name in self._definers:
                    self._mentions.setdefault(name, array("l")).append(number)

    def users(self, path: str, definition: Definition) -> list[str]:
        """The other files that use a definition of the file `path`, sorted."""
        name = simple(definition)
        mentions = self._mentions.get(name)
        if mentions is None or not _can_be_used(definition):
            return []
        own = self._numbers[path]
        definers, language = self._definers[name], self._languages[own]
        found = {
            each
            for each in map(self._numbers.__getitem__, self._graph.importers.get(path, ()))
            if _holds(mentions, each)
        }
        if len(definers) == 1:
            documents = {each for each in mentions if self._languages[each] in DOCUMENTS}
            if definition.kind == "method":  # `page` is a word
                documents.intersection_update(self._mentions.get(_outer(definition.name), ()))
            found |= documents
        global_ = language not in ("Python", "JavaScript") and (definition.kind != "method" or language in _LOOSE)
        if global_ and all(each == own or self._languages[each] != language for each in definers):
            found.update(each for each in mentions if self._languages[each] == language)
        found.discard(own)
        return sorted(self._paths[each] for each in found)


def _outer(name: str) -> str:
    """The class of a method."""
    return simple_name(without_parameters(name).rpartition("::")[0] or name.rpartition(".")[0])


def _can_be_used(definition: Definition) -> bool:
    return definition.kind not in ("heading", "key") and not definition.kind.startswith("local ")


def _holds(numbers: array[int], number: int) -> bool:
    at = bisect_left(numbers, number)
    return at < len(numbers) and numbers[at] == number
