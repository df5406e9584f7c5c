"""Models over several processes: FSDP2, tensor parallelism, and the group that trains together."""

from ..nn.view import Distributed, register
from .fsdp import begin_anew, shard
from .tensor_parallel import Part

register(Distributed(shard, Part.of, begin_anew))
