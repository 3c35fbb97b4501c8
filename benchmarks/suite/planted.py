"""What is planted into a test: work made larger by a fraction, from the environment."""

import json
import os


def planted(test: str) -> float:
    """The fraction of `GPUPERF_PLANTED`: a number for all tests, or an object with one each, such as {"copy": 0.03}."""
    found = json.loads(os.environ.get("GPUPERF_PLANTED", "0"))
    return float(found.get(test, 0.0) if isinstance(found, dict) else found)
