"""headway batch: a file of rows in, a file of answered rows out."""

from __future__ import annotations

import gc
import sys
from dataclasses import asdict, replace
from typing import Any

from headway.batch import job
from headway.batch.config import EngineProcessorConfig
from headway.batch.flow import Flow
from headway.batch.job import Job, JobOptions, Summary
from headway.batch.options import BatchOptions
from headway.batch.processor import Processor, build_processor
from headway.batch.stages.engine import EngineStage
from headway.batch.template import PromptTemplate
from headway.config import EngineArgs


def run(options: BatchOptions, args: EngineArgs) -> int:
    """Exit status 0, or 1 if no row could be answered. What ends the job early keeps what is done.

    Only rows go to the standard output, if they are to go there: the rest is for people.
    """
    gc.set_threshold(20_000, 20, 50)  # rows are many objects and no cycles
    template = _template(options)
    with build_processor(_config(options, args), preprocess=template) as processor:
        if options.ray is not None:
            return _run_on_ray(options, processor)
        fingerprint = {**processor.fingerprint(), **({template.option: template.text} if template else {})}
        work = Job(
            options.input,
            options.output,
            _job_options(options),
            fingerprint,
            options.stop_on_error,
            job.request_reader(processor),
        )
        flow = processor.flow()
        try:
            summary = job.run(work, flow)
        except BaseException:
            if work.kept:
                print("headway: {} answered rows are kept in {}; --resume goes on".format(*work.kept), file=sys.stderr)
            raise
        return _report(summary, flow)


def _run_on_ray(options: BatchOptions, processor: Processor) -> int:
    from headway.batch.ray import files

    assert options.ray is not None
    kinds = options.input_format, options.output_format
    rows, failed = files.run(processor, options.input, options.output, options.ray, kinds, options.id_column)
    print(f"{rows - failed} rows answered, {failed} failed: in {options.output}", file=sys.stderr)
    return 1 if rows and failed == rows else 0


def _template(options: BatchOptions) -> PromptTemplate | None:
    text = options.prompt_template or options.message_template
    return PromptTemplate(text, chat=options.message_template is not None) if text is not None else None


def _config(options: BatchOptions, args: EngineArgs) -> EngineProcessorConfig:
    generates = options.task == "generate"
    sampling: dict[str, Any] = {}
    if generates:
        sampling = {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_p")}
        sampling |= options.sampling or {}
    args = replace(args, runner="generate" if generates else "pooling")
    given = {name: value for name, value in asdict(args).items() if value is not None and name != "model"}
    return EngineProcessorConfig(
        model_source=args.model,
        engine_kwargs=given,
        task_type=options.task,
        sampling_params=sampling,
        should_continue_on_error=not options.stop_on_error,
    )


def _job_options(options: BatchOptions) -> JobOptions:
    return JobOptions(
        resume=options.resume,
        retry_failed=options.retry_failed,
        errors=options.errors,
        flush_interval_s=options.flush_interval_s,
        input_format=options.input_format,
        output_format=options.output_format,
    )


def _report(summary: Summary, flow: Flow) -> int:
    tally = summary.tally
    print(f"{tally.rows - tally.failed} rows answered, {tally.failed} failed{_pace(summary, flow)}", file=sys.stderr)
    if tally.first_error is not None:
        print(f"headway: the first that failed: {' '.join(tally.first_error.split())}", file=sys.stderr)
    return 1 if tally.rows and tally.failed == tally.rows else 0


def _pace(summary: Summary, flow: Flow) -> str:
    """What this run did, how fast, and what ran."""
    stage = next(stage for stage in flow.stages if isinstance(stage, EngineStage))
    if not summary.ran:
        return ": the job was complete"
    llm, counts, elapsed = stage.llm, stage.counts, summary.elapsed_s
    info, isa = llm.executor_info, llm.config.device.isa
    kernels = f"{info.kernels} ({isa})" if info.kernels == "cpu" else info.kernels
    why = next(c.reason for c in llm.config.choices if c.name == "distributed_executor_backend")
    tokens = counts.output_tokens or counts.prompt_tokens
    return (
        f": {tokens} tokens in {elapsed:.1f} s ({tokens / elapsed:.0f} tokens/s) after {summary.startup_s:.1f} s of "
        f"start-up; threads {info.threads}, kernels {kernels}, executor {info.executor}: {why}"
    )
