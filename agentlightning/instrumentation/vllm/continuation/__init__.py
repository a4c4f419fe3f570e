"""Chat prompts that go on from the exact ids of earlier calls (`AGL_CONTINUE`), where vLLM renders and tokenises them.

vLLM turns the requests of all three chat interfaces into messages, renders these and tokenises the text. In between,
the text is known and no id: the call that it continues is looked up, the template is proved to append only, and ids
take the place of the text. All that comes before and after is vLLM's. When the engine has answered, the call is kept
for the next one, in this process; what others have answered is read from the store that all record into.
"""

from agentlightning.instrumentation.vllm.continuation.chats import ROUTES
from agentlightning.instrumentation.vllm.continuation.kept import report, start
from agentlightning.instrumentation.vllm.continuation.patches import CHAT_PATCHES, RENDERING_PATCHES
from agentlightning.instrumentation.vllm.continuation.prompts import note_finished
from agentlightning.instrumentation.vllm.continuation.recall import forget

__all__ = [
    "CHAT_PATCHES",
    "PATCH_SETS",
    "RENDERING_PATCHES",
    "ROUTES",
    "forget",
    "note_finished",
    "report",
    "start",
]

PATCH_SETS = ("continuation", "chat rendering")
"""The names of the sets of its patches. With one of them alone, nothing is continued."""
