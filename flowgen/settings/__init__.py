"""Configs: frozen dataclasses that check themselves, and their way to JSON, to a command line and to help.

A config is a class under `config`. Its fields declare by their types what they may be (`flowgen.settings.ranges` has
ranges), its docstring has a line for each, and `__post_init__` checks what relates several fields. Errors name the bare
field; who knows where the config stands puts that in front. Knows nothing else of flowgen.
"""

from flowgen.settings.annotations import type_name
from flowgen.settings.command import override, resolve, words_of
from flowgen.settings.help import Setting, help_of, leaf_names, settings
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
    "in_group",
    "leaf_names",
    "override",
    "resolve",
    "settings",
    "to_plain",
    "type_name",
    "words_of",
]
