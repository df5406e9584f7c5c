"""Models over several processes: FSDP2, tensor parallelism, and the group that trains together."""

from ..nn.view import HANDLERS
from .fsdp import begin_anew, shard
from .tensor_parallel import CutWeight

HANDLERS.shard, HANDLERS.cut, HANDLERS.begin_anew = shard, CutWeight, begin_anew
