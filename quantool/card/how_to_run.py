"""How to run what a folder holds: commands and snippets for the model card, one set for each engine."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence

from quantool.card.holdings import adapters
from quantool.card.how_to_embed import loaded, served
from quantool.card.modelfile import ollama
from quantool.card.other_engines import desktop, sglang, tool_request
from quantool.card.vllm_arguments import GPU_BYTES, serve_arguments, tool_parser
from quantool.formats.gguf_header import SIDECARS
from quantool.records import OutputPlan, Plan, Report
from quantool.report.recommend import recommend
from quantool.report.sections import folded
from quantool.report.table import markdown

SERVED = 4096
"""Tokens of context that the examples ask for; less where the model reads less."""
PORTS = {"llama.cpp": 8080, "transformers": 8000}
QUESTION = "What is the capital of France?"
START = "The capital of France is"


def served_context(plan: Plan) -> int:
    """Tokens of context that the examples ask for."""
    return min(SERVED, plan.source.facts.context)


def usage(
    plan: Plan, outputs: Sequence[OutputPlan], reports: Sequence[Report], sampling: Mapping[str, float]
) -> str:
    """Commands for the recommended file; what to send them and every other file behind folds.

    ``sampling`` is what is recommended.
    """
    repo_id = next((output.repo_id for output in outputs if output.repo_id), None)
    facts = plan.source.facts
    context, task = served_context(plan), facts.task
    chat, tools = facts.chat_template is not None, tool_parser(facts) is not None
    if outputs[0].engine != "llama.cpp" and not task.generates:
        return loaded(repo_id or outputs[0].repo, task, context)
    if outputs[0].engine != "llama.cpp":
        named = repo_id or outputs[0].repo
        sizes = [report.artifact.bytes() for report in reports] or [
            sum(file.bytes for file in output.files) for output in outputs
        ]
        arguments = [f"--max-model-len {context}", *serve_arguments(facts, sizes[0]), *_cache(outputs[0])]
        parts = [
            _vllm(outputs[0], named, arguments) + _client("transformers", named, sampling, chat=chat),
            tool_request(PORTS["transformers"], named) if tools else "",
            sglang(outputs[0].level, named, facts, sizes[0], context),
            "" if _is_autoawq(outputs[0]) else _transformers(named, sampling, chat=chat),
        ]
        return "\n".join(part for part in parts if part)
    files = {report.artifact.level: [file.name for file in report.artifact.files] for report in reports}
    files = files or {output.level: [file.name for file in output.files] for output in outputs}
    chosen = recommend(reports)
    level = chosen.report.artifact.level if chosen else next(iter(files))
    if not task.generates:
        return served(_choice(repo_id, files, level), task, context)
    adapter = next(iter(adapters(reports)), "")
    asked = f"{_added(adapter)} -c {context}{' --jinja' if tools else ''}"
    tagged = repo_id is not None and not adapter and _choice(repo_id, files, level).endswith(f":{level}")
    parts = [
        _llama(repo_id, files, level, asked, adapter),
        _client("llama.cpp", repo_id or files[level][0], sampling, chat=chat),
        tool_request(PORTS["llama.cpp"], repo_id or files[level][0]) if tools else "",
        _python(files[level], context, sampling, adapter, chat=chat),
        desktop(repo_id, level) if repo_id and tagged else "",
        ollama(outputs[0].repo, reports, sampling, context),
        _every_level(repo_id, files, level, asked),
    ]
    return "\n".join(part for part in parts if part)


def _llama(
    repo_id: str | None, files: Mapping[str, Sequence[str]], level: str, arguments: str, adapter: str
) -> str:
    """Both programs; ``--jinja`` (the default since 2025) is what an older server needs to read tool calls."""
    command = f"{_choice(repo_id, files, level)}{arguments}"
    fetched = f"hf download {repo_id} {adapter} --local-dir .\n" if adapter and repo_id else ""
    needed = "The files are the base model's: every command adds the adapter.\n\n" if adapter else ""
    return (
        f"With [llama.cpp](https://github.com/ggml-org/llama.cpp):\n\n{needed}"
        f"```sh\n{fetched}llama-server {command}\nllama-cli {command}\n```\n"
    )


def _added(adapter: str) -> str:
    return f" --lora {adapter}" if adapter else ""


def _every_level(repo_id: str | None, files: Mapping[str, Sequence[str]], level: str, arguments: str) -> str:
    """The command for each level, and how to have the file itself."""
    rows = [[tag, f"`llama-server {_choice(repo_id, files, tag)}{arguments}`"] for tag in files]
    text = markdown(["level", "command"], rows) + "\n" if len(files) > 1 else ""
    if repo_id:
        first = files[level][0]
        text += (
            "From files on disk:\n\n```sh\n"
            f"{_download(repo_id, files[level])}llama-server -m {first}{arguments}\n```\n"
        )
    return folded("Other levels, files on disk" if len(files) > 1 else "Files on disk", text)


def _choice(repo_id: str | None, files: Mapping[str, Sequence[str]], level: str) -> str:
    """The arguments that name a level's file."""
    first = files[level][0]
    every = [name for names in files.values() for name in names]
    return _chosen(repo_id, level, first, every) if repo_id else f"-m {first}"


def _chosen(repo_id: str, level: str, name: str, every: Sequence[str]) -> str:
    """``-hf repo:LEVEL`` where llama.cpp finds this very file by it, else the file by its name.

    As common/download.cpp of llama.cpp: the first model file whose path has the tag before a dot or a dash, in any
    case; ``F16`` is also the end of ``BF16``.
    """
    tag = re.compile(re.escape(level) + "[.-]", re.IGNORECASE)
    models = [path for path in sorted(every) if not any(mark in path for mark in SIDECARS)]
    found = next((path for path in models if tag.search(path)), None)
    return f"-hf {repo_id}:{level}" if found == name else f"-hf {repo_id} -hff {name}"


def _download(repo_id: str, names: Sequence[str]) -> str:
    if len(names) == 1:
        return f"hf download {repo_id} {names[0]} --local-dir .\n"
    pattern = names[0].rpartition("-00001-of-")[0] + "-*.gguf"
    return f'hf download {repo_id} --include "{pattern}" --local-dir .\n'


def _vllm(output: OutputPlan, named: str, arguments: Sequence[str]) -> str:
    text = "With [vLLM](https://docs.vllm.ai):\n\n"
    separator = " " if len(arguments) == 1 else " \\\n  "
    text += f"```sh\nvllm serve {separator.join([named, *arguments])}\n```\n\n"
    if any(argument.startswith("--tensor-parallel-size") for argument in arguments):
        text += f"The number of GPUs is for those with {GPU_BYTES / 1e9:.0f} GB.\n\n"
    if output.level.startswith("FP8"):
        text += "GPUs of compute capability 8.9 and more (Ada, Hopper) compute in FP8 themselves.\n\n"
    return text


def _client(engine: str, model: str, sampling: Mapping[str, float], *, chat: bool) -> str:
    """A request to either server, as OpenAI's API has it."""
    url = f"http://localhost:{PORTS[engine]}/v1"
    known = ("temperature", "top_p")  # OpenAI's own; further ones go into extra_body
    own = "".join(f", {name}={sampling[name]:g}" for name in known if name in sampling)
    extra = {name: value for name, value in sampling.items() if name not in known}
    own += f", extra_body={json.dumps(extra)}" if extra else ""
    if chat:
        call = f'client.chat.completions.create(\n    model="{model}", messages=[{{"role": "user", "content": "{QUESTION}"}}]'
        result = "answer.choices[0].message.content"
    else:
        call = f'client.completions.create(\n    model="{model}", prompt="{START}"'
        result = "answer.choices[0].text"
    return folded(
        "From OpenAI's client",
        "While the server runs (`pip install openai`):\n\n"
        "```python\nfrom openai import OpenAI\n\n"
        f'client = OpenAI(base_url="{url}", api_key="none")\n'
        f"answer = {call},\n    max_tokens=64{own},\n)\nprint({result})\n```\n",
    )


def _cache(output: OutputPlan) -> list[str]:
    """Calibrated scales of the attention cache count in vLLM only for a cache in FP8, which has to be asked for."""
    return ["--kv-cache-dtype fp8"] if output.options.get("kv_cache") else []


def _is_autoawq(output: OutputPlan) -> bool:
    """Whether it is in a layout for which transformers asks for one more library."""
    return output.options.get("format") == "autoawq"


def _transformers(named: str, sampling: Mapping[str, float], *, chat: bool) -> str:
    """The folder in transformers, which unpacks it with compressed-tensors."""
    samples = bool(sampling) and sampling.get("temperature") != 0
    own = "".join(f", {name}={value:g}" for name, value in sampling.items() if samples)
    own = f", do_sample={samples}{own}"
    if chat:
        inputs = f"""inputs = tokenizer.apply_chat_template(
    [{{"role": "user", "content": "{QUESTION}"}}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
).to(model.device)"""
    else:
        inputs = f'inputs = tokenizer("{START}", return_tensors="pt").to(model.device)'
    return folded(
        "From transformers",
        "`pip install transformers accelerate compressed-tensors`, then:\n\n"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        f'tokenizer = AutoTokenizer.from_pretrained("{named}")\n'
        f'model = AutoModelForCausalLM.from_pretrained("{named}", device_map="auto")\n'
        f"{inputs}\n"
        f"answer = model.generate(**inputs, max_new_tokens=64{own})\n"
        'print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))\n```\n',
    )


def _python(
    names: Sequence[str], context: int, sampling: Mapping[str, float], adapter: str, *, chat: bool
) -> str:
    """llama-cpp-python on a file; further shards are found beside the first."""
    renamed = {"repetition_penalty": "repeat_penalty"}
    own = "".join(f", {renamed.get(name, name)}={value:g}" for name, value in sampling.items())
    if chat:
        call = f'model.create_chat_completion(\n    [{{"role": "user", "content": "{QUESTION}"}}], max_tokens=64{own}\n)'
        result = 'answer["choices"][0]["message"]["content"]'
    else:
        call = f'model.create_completion("{START}", max_tokens=64{own})'
        result = 'answer["choices"][0]["text"]'
    text = "`pip install llama-cpp-python`, then in the folder of the file:\n\n"
    text += "```python\nfrom llama_cpp import Llama\n\n"
    lora = f', lora_path="{adapter}"' if adapter else ""
    text += f'model = Llama("{names[0]}"{lora}, n_ctx={context}, verbose=False)\n'
    return folded("From Python", text + f"answer = {call}\nprint({result})\n```\n")
