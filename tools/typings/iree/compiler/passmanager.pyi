# Comes from an extension module or is generated, without a stub: everything in it is Any.
from typing import Any

def __getattr__(name: str) -> Any: ...
