"""The run-time type checker of the tests: beartype, with an int where a float is asked for, as in the type system."""

from beartype import BeartypeConf, beartype

beartyped = beartype(conf=BeartypeConf(is_pep484_tower=True))
