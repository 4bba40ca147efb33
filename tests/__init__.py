"""The tests; `utils` comes first, for what it sets must be set before torch is imported."""

import utils  # noqa: F401
