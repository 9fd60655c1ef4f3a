"""Configs: validated frozen dataclasses that can be converted to JSON, set on the command line, and listed as help.

A config is a class decorated with `config`. Its annotations declare the allowed values (`flowgen.settings.ranges` has
ranges), its docstring has an entry for each field, and `__post_init__` checks relations between fields. An error
message names only the field, and the enclosing config adds the group. A field may accept user-defined objects, which
are written as "package.module:object" in text (`flowgen.settings.named`). This package imports no other part of
flowgen.
"""

from flowgen.settings.annotations import type_name
from flowgen.settings.command import override, words_of
from flowgen.settings.help import Setting, help_of, leaf_names, settings
from flowgen.settings.named import import_module, import_object, name_of, resolve
from flowgen.settings.plain import (
    TYPE,
    FieldError,
    check,
    config,
    differences,
    from_plain,
    in_group,
    to_plain,
)

__all__ = [
    "TYPE",
    "FieldError",
    "Setting",
    "check",
    "config",
    "differences",
    "from_plain",
    "help_of",
    "import_module",
    "import_object",
    "in_group",
    "leaf_names",
    "name_of",
    "override",
    "resolve",
    "settings",
    "to_plain",
    "type_name",
    "words_of",
]
