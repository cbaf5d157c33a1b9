"""All targets, by name."""

from .checkpoints import ConfigFile, Header, Index
from .generation_config import GenerationConfig
from .servers import Replies, Requests

TARGETS = {
    "config": ConfigFile,
    "header": Header,
    "index": Index,
    "requests": Requests,
    "replies": Replies,
    "generation_config": GenerationConfig,
}
