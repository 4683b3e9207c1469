"""Into how many ranks' shares a model's quantised matrices can be cut: a group, a block or a word of codes belongs to one rank.

The sizes that the model's own shape allows are the config's business.
"""

from dashinfer.errors import UnsupportedModel
from dashinfer.models.config import ModelConfig
from dashinfer.models.linears import WeightFormat
from dashinfer.models.parallel import share_heads
from dashinfer.models.shapes import HEAD, tensor_shapes
from dashinfer.models.stage import Stage
from dashinfer.models.weights import Part, WeightReader


def check_split(form: WeightFormat, reader: WeightReader, config: ModelConfig, world_size: int, stage: Stage) -> None:
    """Raises UnsupportedModel, naming the sizes that work, if a rank's share of a matrix cuts what `form` cannot."""
    if world_size == 1:
        return
    limits = []
    for name, shape in tensor_shapes(config, stage).items():
        if len(shape) == 2 and (name.endswith("_proj.weight") or name == HEAD):
            outputs, inputs = form.steps(reader, Part(name, shape))
            limits += [(name, "outputs", shape[0], outputs), (name, "inputs", shape[1], inputs)]
    limits = [limit for limit in limits if limit[3] > 1]
    for name, what, size, step in limits:
        if not _fits(config, name, what, size, step, world_size):
            works = [
                str(each)
                for each in config.tensor_parallel_sizes()
                if each == 1 or all(_fits(config, *limit, each) for limit in limits)
            ]
            module = name.removesuffix(".weight")
            raise UnsupportedModel(
                f"--tensor-parallel {world_size} cuts {module}, whose {size} {what} are quantised in pieces of {step}; "
                f"these sizes work: {', '.join(works)}"
            )


def _fits(config: ModelConfig, name: str, what: str, size: int, step: int, world_size: int) -> bool:
    """Whether the shares of each rank begin and end with a piece of `step`, or are all that there is."""
    if name.endswith(("o_proj.weight", "down_proj.weight")) != (what == "inputs"):
        return True  # each rank has all
    if name == HEAD:
        return -(-size // world_size) % step == 0
    if name.endswith(("gate_proj.weight", "up_proj.weight", "down_proj.weight")):
        return size // world_size % step == 0
    shares = [share_heads(config.num_heads, config.num_kv_heads, rank, world_size) for rank in range(world_size)]
    of_keys = name.endswith(("k_proj.weight", "v_proj.weight"))
    ends = {end for share in shares for end in ((share.kv_start, share.kv_stop) if of_keys else (share.start, share.stop))}
    return all(end * config.head_dim % step == 0 or end * config.head_dim == size for end in ends)
