"""The file of ONNX: a graph that onnxruntime and its like run, without torch and without Tubelet.

    session = onnxruntime.InferenceSession("model.onnx")
    (logits,) = session.run(None, {"clips": clips})               # clips (B, T, H, W, 3) uint8, any B
    classes = json.loads(session.get_modelmeta().custom_metadata_map["tubelet.json"])["classes"]

ONNX is written in protobuf, which ends at 2 GB: encoders of the sizes S, B and L fit, H and g do not. Larger weights
could lie in a file beside the graph, but one file is what an export promises; so they are refused.

What writes and runs it is an extra, `pip install 'tubelet[onnx]'`.
"""

import contextlib
import itertools
import logging
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from pretrain.errors import Refused

CLIPS, LOGITS = "clips", "logits"
LARGEST_WEIGHTS_BYTES = 2**31 - 2**26
"""What weights may take: the 2 GB of protobuf, less 64 MB for the graph."""


def write(model: nn.Module, clips: Tensor, metadata: dict[str, str], file: Path) -> None:
    """Writes a model as a graph for any number of clips; arguments as for `Format.write`.

    Raises:
        Refused: The extra is not installed, or the weights are more than one file holds.
    """
    import_onnxruntime()
    size = sum(tensor.nbytes for tensor in itertools.chain(model.parameters(), model.buffers()))
    if size > LARGEST_WEIGHTS_BYTES:
        raise Refused(
            f"out: weights of {size / 1e9:.2f} GB are more than the {LARGEST_WEIGHTS_BYTES / 1e9:.2f} GB "
            f"that a file of ONNX holds; name a file NAME.pt2"
        )
    from onnx_ir.passes.common import ClearMetadataAndDocStringPass

    with _without_warnings():
        program = torch.onnx.export(
            model,
            (clips,),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            input_names=[CLIPS],
            output_names=[LOGITS],
            verbose=False,
        )
    assert program is not None, "dynamo returns a program"
    # Every node tells the lines of source that it was made from, with the folders of this machine.
    ClearMetadataAndDocStringPass()(program.model)
    program.model.metadata_props.update(metadata)
    file.write_bytes(program.model_proto.SerializeToString())


def read(file: Path) -> Callable[[Tensor], Tensor]:
    """Returns the function from clips to logits that a file holds, run by onnxruntime on the CPU."""
    runtime = import_onnxruntime()
    options = runtime.SessionOptions()
    # Left to itself it binds a thread to every core of the machine, and complains of those that a job may not use.
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda clips: torch.from_numpy(session.run([LOGITS], {CLIPS: clips.numpy()})[0])


def import_onnxruntime() -> ModuleType:
    """Imports all of the extra; raises `Refused` where a part of it is missing."""
    try:
        import onnx  # noqa: F401
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise Refused(
            f"out: ONNX cannot be written ({error}); pip install 'tubelet[onnx]', or name a file NAME.pt2"
        ) from None
    return onnxruntime


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    """Silences what the exporter says of its own insides: no user can act on it, and the file is checked."""
    optimizer = logging.getLogger("onnxscript")
    level = optimizer.level
    optimizer.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        optimizer.setLevel(level)
