"""On PYTHONPATH, llmcompressor's processes work together without GPUs: each keeps weights of its own, as on a GPU of its own.

llmcompressor 0.14 shares them in memory, where processes that compute on them would change them twice.
"""

import os
from functools import partial

if "RANK" in os.environ:
    import torch
    from compressed_tensors.compressors.model_compressors import model_compressor  # type: ignore[import-untyped]
    from compressed_tensors.offload import load  # type: ignore[import-untyped]
    from compressed_tensors.offload.cache import CPUCache, OffloadCache  # type: ignore[import-untyped]
    from llmcompressor.modifiers.gptq import base as gptq
    from llmcompressor.modifiers.quantization.quantization import base as quantization
    from llmcompressor.modifiers.transform.awq import base as awq
    from llmcompressor.utils.dist import broadcast_qparams_and_cleanup

    def _sums(data: list[torch.Tensor]) -> list[torch.Tensor]:
        for datum in data:
            torch.distributed.all_reduce(datum)
        return data

    OffloadCache.cls_from_device = classmethod(lambda *_: CPUCache)
    load.is_source_process = lambda: True
    load._get_device_memory = dict
    model_compressor.is_distributed = lambda: False
    awq._allreduce_data_sum = _sums
    for module in (gptq, quantization):
        everywhere = partial(broadcast_qparams_and_cleanup, skip_cpu=False)
        module.broadcast_qparams_and_cleanup = everywhere  # type: ignore[attr-defined]
