"""Run in the server's environment: engines of vLLM, one after the other in one process, as standard input lists them.

``avx2`` as its argument has the process take the processor for one without AVX-512, ``gpu`` for a GPU whose kernels
Triton's interpreter runs.
"""

import json
import os
import sys

PROBES = ("_is_avx512_supported", "_is_avx512_bf16_supported", "_is_vnni_supported", "_is_amx_tile_supported")


def main() -> None:
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if sys.argv[1:] == ["avx2"]:
        os.environ |= {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "ELSA_KERNELS_ISA": "avx2"}
        import torch

        for probe in PROBES:
            setattr(torch.cpu, probe, lambda: False)
    if sys.argv[1:] == ["gpu"]:
        os.environ["TRITON_INTERPRET"] = "1"
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    if sys.argv[1:] == ["gpu"]:
        take_cpu_for_gpu()

    question = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    for job in json.load(sys.stdin):
        prompt = job.pop("prompt")
        engine = LLM(**job)
        [answer] = engine.generate([{"prompt_token_ids": prompt}], question, use_tqdm=False)
        positions = answer.prompt_logprobs[1:]
        logprobs = [position[token].logprob for token, position in zip(prompt[1:], positions, strict=True)]
        print("\nANSWER " + json.dumps(logprobs), flush=True)
        del engine
        cleanup_dist_env_and_memory()


def take_cpu_for_gpu() -> None:
    """Of this package alone: vLLM itself goes on as on a CPU. Afterwards only products of GPUs can be computed."""
    import torch
    from elsa_kernels import gpu_layout
    from elsa_kernels.gpu_linear import gpu_linear

    from elsa_sparse import vllm_compressed

    gpu_layout.GPU_DEVICES = frozenset({"cpu"})
    vllm_compressed.serves_on_gpu = lambda: True
    take_cpu_for_gpu.library = library = torch.library.Library("elsa_kernels", "IMPL")
    library.impl("linear", gpu_linear, "CPU", allow_override=True)


if __name__ == "__main__":
    main()
