"""Records of what one model call consumed and produced."""

from __future__ import annotations

import json
import subprocess
import sys
import uuid
from array import array

import pytest

from agentlightning.generation import Choice, Generation, RoutedExperts, new_id
from tests.common.generations import START

pytestmark = pytest.mark.tier("check")

LIGHT = """\
import sys
import agentlightning.generation, agentlightning.recorder, agentlightning.settings, agentlightning.store
print(*sys.modules)
"""


def test_an_id_is_a_uuid_of_version_7_that_tells_its_moment() -> None:
    found = uuid.UUID(new_id(START + 123_456_789))

    assert (found.version, found.variant) == (7, uuid.RFC_4122)
    assert found.int >> 80 == START // 1_000_000 + 123


def test_ids_are_in_the_order_of_their_moments() -> None:
    ids = [new_id(START + 500 * number) for number in range(5_000)]

    assert ids == sorted(ids)


def test_ids_of_one_moment_differ() -> None:
    assert len({new_id(START) for _ in range(10_000)}) == 10_000


def test_unknown_fields_are_none() -> None:
    generation = Generation(request_id="chatcmpl-1", finished_at=START, status="error")

    assert uuid.UUID(generation.id).version == 7
    assert (generation.rollout_id, generation.prompt_token_ids, generation.choices) == (None, None, [])


def test_a_generation_as_a_dictionary_is_json_with_the_fields_names() -> None:
    choice = Choice(token_ids=array("i", [7, 8]), logprobs=array("f", [-0.5, -2.0]), weight_versions=[("v1", 0, 2)])
    choice.routed_experts = RoutedExperts((2, 1, 2), array("h", [4, 5, 6, 7]))
    generation = Generation(
        request_id="chatcmpl-1",
        finished_at=START,
        status="finished",
        prompt_token_ids=array("i", [1, 2, 3]),
        choices=[choice],
    )

    read = json.loads(json.dumps(generation.as_dict()))

    assert list(read) == list(Generation.__slots__)
    assert (read["id"], read["prompt_token_ids"], read["prompt_text"]) == (generation.id, [1, 2, 3], None)
    assert read["choices"] == [
        {
            "index": 0,
            "token_ids": [7, 8],
            "logprobs": [-0.5, -2.0],
            "text": None,
            "finish_reason": None,
            "stop_reason": None,
            "weight_versions": [["v1", 0, 2]],
            "routed_experts": [[[4, 5]], [[6, 7]]],
            "sampling_mask": None,
            "top_logprobs": None,
        }
    ]


def test_what_a_server_imports_for_recording_is_without_sqlalchemy_until_a_store_is_opened() -> None:
    modules = subprocess.run([sys.executable, "-c", LIGHT], capture_output=True, text=True, check=True).stdout.split()

    assert "agentlightning.recorder" in modules
    assert "sqlalchemy" not in modules
