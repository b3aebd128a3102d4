"""Run in the server's environment: engines of vLLM, one after the other in one process, as standard input lists them.

``avx2`` as its argument has the process take the processor for one without AVX-512.
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
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

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


if __name__ == "__main__":
    main()
