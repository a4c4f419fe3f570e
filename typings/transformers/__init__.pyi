# Its own __init__ takes pyright a quarter of a minute to bind, for five names of which we ask nothing.
from typing import Any

def __getattr__(name: str) -> Any: ...
