# The bindings of the IR are an extension module that ships without stubs: everything in it is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
