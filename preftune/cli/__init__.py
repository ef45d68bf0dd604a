"""The command line: flags and YAML files as one configuration; help, notes and errors in words."""

from preftune.cli.parser import (
    are_errors_raised,
    dump,
    end_if_interrupted,
    errors_raised,
    exit_on_user_error,
    flag_types,
    parse,
)

__all__ = [
    "are_errors_raised",
    "dump",
    "end_if_interrupted",
    "errors_raised",
    "exit_on_user_error",
    "flag_types",
    "parse",
]
