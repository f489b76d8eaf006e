from __future__ import annotations

import getpass
import json
import platform

from gossamer.measure import describe_machine


def test_the_description_is_complete_and_survives_json():
    found = describe_machine()
    assert json.loads(json.dumps(found)) == found
    for key in ("cpu", "cores", "threads", "memory_gib", "flags", "gpu", "os", "python", "torch", "transformers"):
        assert key in found
    assert found["gossamer"]
    assert found["torch_threads"] >= 1


def test_the_description_names_no_host_user_or_path():
    found = describe_machine()
    words = {word for value in found.values() for word in str(value).split()}
    assert not any(word.startswith(("/", "~")) for word in words)
    assert platform.node() not in words
    assert getpass.getuser() not in words
