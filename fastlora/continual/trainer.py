"""The loop: train on one task after the other, merge, evaluate everything after each."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastlora.continual.annealing import cosine
from fastlora.continual.batches import generator_for
from fastlora.continual.config import CoDyRAConfig, MethodConfig, RunConfig
from fastlora.continual.device import find_device
from fastlora.continual.distributed import join
from fastlora.continual.drift import Drift
from fastlora.continual.evaluation import Evaluation, evaluate
from fastlora.continual.graphed_step import GraphedStep, check_capture
from fastlora.continual.loggers import Loggers
from fastlora.continual.memory import out_of_memory, ran_out_of_memory
from fastlora.continual.methods import TaskContext, build_method
from fastlora.continual.methods.distillation import Distillation, check_reference, distils
from fastlora.continual.parallel import check_parallel
from fastlora.continual.precision import DTYPES, check_dtype
from fastlora.continual.progress import Progress
from fastlora.continual.record import RankEntry, Record
from fastlora.continual.run_keeper import RunKeeper
from fastlora.continual.step import training_step
from fastlora.continual.stream import MapStyle, Task, TaskStream
from fastlora.continual.training_data import Batch, TrainingData, open_data

if TYPE_CHECKING:
    from fastlora.continual.dry_run import Plan


class Trainer:
    """Trains a CLIP model on a stream of tasks.

        record = Trainer(model, tokenizer, stream, CoDyRAConfig(), seed=0, out="runs/mine").fit()

    Where torchrun started several processes, each builds the same trainer, and they share the work of every batch and
    evaluation: the run is that of one process but for rounding. Process 0 writes and prints; all return the record.

    Args:
        model: an open_clip model; changed in place. After `fit` it is a plain model with every task merged.
        tokenizer: list of texts -> [n, context] integers.
        stream: tasks and held-out set; its training data is used up.
        method: the method's config; it says which method.
        seed: adapters and image order are functions of it and the task. Same seed, same result, bit for bit, on a CPU.
            Torch's global generator is seeded from it at every task, for models that drop something out.
        out: run directory to make; None keeps everything in memory.
        progress: print a bar or lines.
        config: the whole run's config; it takes the place of method, seed and options.
        resume: go on with the run in `out` from its last finished task, given the same model, stream and options: the
            result is bit for bit that of a run which was never cut short, on a CPU. An unfinished task starts again.
            Where `out` holds no finished task, the run starts from the beginning.
        options: further fields of RunConfig (device, backend, dtype, accumulate, eval_batch_size, checkpoints, ...).
    Raises:
        ValueError: an option is out of range, does not go with another, with the stream or with several processes.
        OSError: `out` cannot be made, exists already, or is no run to resume.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        stream: TaskStream,
        method: MethodConfig = CoDyRAConfig(),
        *,
        seed: int = 0,
        out: str | os.PathLike[str] | None = None,
        progress: bool = True,
        resume: bool = False,
        config: RunConfig | None = None,
        **options: Any,
    ) -> None:
        self.config = config or RunConfig(benchmark=stream.name, method=method, seed=seed, **options)
        self.method = build_method(self.config.method, backend=self.config.backend)
        self.method.check(stream)
        check_dtype(self.config.dtype, self.method.adapters_alone, self.config.method.name)
        config_of_method = self.config.method
        if distils(config_of_method):
            check_reference(config_of_method, stream, images=config_of_method.distil_on == "reference")
        self.world = join(self.config.device)
        check_parallel(self.config, self.method, self.world)
        self.device = find_device(self.config.device, self.world.local_rank)
        if self.config.cuda_graph:
            check_capture(self.config, self.method, self.device)
        self.model: Any = model.to(self.device)
        self.tokenizer, self.stream = tokenizer, stream
        self.record = Record([task.name for task in stream.tasks])
        self.out = None if out is None else Path(out)
        self._keeper = RunKeeper(self.out, self.config, resume, self.world)
        self._trained = 0
        self.world.broadcast_(self.model.state_dict().values())
        self._drift = Drift(self.model)
        self._spent = {"train": 0.0, "evaluate": 0.0}
        self._progress = Progress(self.config.method.name, progress and self.world.first)
        log_to = self.config.log_to if self.world.first else ()
        self._loggers, self._steps = Loggers(log_to, self.out, self.config.as_dict()), 0

    def fit(self) -> Record:
        """Train on every task of the stream, once.

        Returns:
            What was measured; the run directory holds the same.
        Raises:
            FloatingPointError: the loss is not finite; the message names the step.
            ValueError: the run to resume was started with another configuration, benchmark or model.
            RuntimeError: another run has the directory; or of several processes one was lost, or computes otherwise.
            KeyboardInterrupt: passed on. After this and any other error the model is the plain one after the last
                finished task, and the run directory can be resumed from there.
        """
        try:
            with self._progress:
                self._open()
                evaluation = self._last_evaluation() or self._evaluate("before training")
                for number, task in enumerate(self.stream.tasks, start=1):
                    if number <= self.record.finished_tasks:
                        continue
                    trained = self.method.trains and (number == 1 or not self.method.joint)
                    if trained and number > self._trained:
                        with self._seconds("train"):
                            self._train(number, task)
                        self._trained = number
                        self._commit()
                    # what was not trained since has the figures that it had
                    known = None if trained or self.method.per_dataset else evaluation
                    if trained:
                        self._keep_checkpoint(number)
                    evaluation = self._evaluate(f"task {number}/{len(self.stream)} {task.name}", known)
                self._keeper.finish("finished")
        except BaseException as error:
            self.method.abandon(self.model)
            with contextlib.suppress(OSError):  # a full disk: the error that led here is the one to tell
                self._keeper.finish("interrupted" if isinstance(error, KeyboardInterrupt) else "failed", error)
            raise
        finally:
            self._loggers.close()
            self._keeper.close()
        return self.record

    def _open(self) -> None:
        """Make the run directory, or take up the run that is in it."""
        state = self._keeper.open(self.model, self.method, self.stream, self.device)
        if state is not None:
            self.record, self._trained = state.record, state.trained
            self._spent, self._steps = dict(state.seconds), state.steps
            done, tasks, stopped = state.record.finished_tasks, len(self.stream), self._keeper.resumed().get("stopped")
            self._progress.line(f"resumed after task {done}/{tasks}; before, the run was {stopped}")

    def _commit(self) -> None:
        place = {"record": self.record, "trained": self._trained, "seconds": self._spent, "steps": self._steps}
        self._keeper.commit(self.model, self.method, **place)

    def _keep_checkpoint(self, number: int) -> None:
        last = len(self.stream) if self.method.joint else number  # the weights stay as they are until after this task
        if self.config.keeps_checkpoint(last, len(self.stream)):
            self._keeper.keep_checkpoint(number, self.model)

    def _last_evaluation(self) -> Evaluation | None:
        """The newest row of a run that was taken up."""
        if not self.record.own:
            return None
        held_out = self.record.held_out[-1] if self.record.held_out else None
        return Evaluation(tuple(self.record.own[-1]), tuple(self.record.union[-1]), held_out, seconds=0.0)

    def plan(self) -> Plan:
        """What `fit` would do and need, without doing it. Uses up the stream's training data."""
        from fastlora.continual.dry_run import make_plan

        return make_plan(self)

    def begin(self, number: int, task: Task) -> tuple[TaskContext, TrainingData]:
        """Open the data of a task and make the model ready for its first step.

        Args:
            number: of the task, counted from 1.
            task: the stream's task of that number.
        Returns:
            What the method's hooks get, and the source of the batches.
        """
        config = self.method.config
        tasks, data, numbers = open_data(self.stream, number, self.method.joint)
        shared = config.batch_size, self.config.seed, self.device, self.world
        source = TrainingData(tasks, data, numbers, self.model, self.tokenizer, *shared)
        ctx = self._context(number, task, data[0])
        own = () if self.world.first else (self.world.rank,)  # other rows, other draws
        torch.manual_seed(generator_for(self.config.seed, "dropout", number, *own).initial_seed())
        if distils(config):
            ctx.distillation = Distillation(ctx, config)
            ctx.distillation.teacher.to(DTYPES[self.config.dtype])
        self.method.begin_task(ctx)
        return ctx, source

    def _train(self, number: int, task: Task) -> None:
        config = self.method.config
        ctx, source = self.begin(number, task)
        optimizer = ctx.optimizer
        first_lrs = [group["lr"] for group in optimizer.param_groups]
        losses: list[Tensor] = []
        iterations = config.iterations * len(source)  # joint training takes as many steps as all tasks

        self._progress.start(f"task {number}/{len(self.stream)} {task.name}", iterations)
        with training_step(self.method, ctx, self.config) as eager:
            step = GraphedStep(eager, ctx, config.batch_size) if self.config.cuda_graph else eager
            for iteration in range(iterations):
                for group, lr in zip(optimizer.param_groups, first_lrs):
                    group["lr"] = cosine(lr, iteration, iterations)
                kappa = self.method.kappa(iteration)
                if kappa is not None:
                    optimizer.kappa = kappa
                losses.append(self._step(step, iteration, source.batch(iteration), ctx))
                self._steps += 1
                if iteration % self.config.log_every == 0 or iteration == iterations - 1:
                    self._log(ctx, losses)
                    losses.clear()

        trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
        self.world.check_equal(trained, f"after task {number} ({task.name}) the trained parameters")
        ranks = self.method.end_task(ctx)
        if ranks is not None:
            rank = getattr(config, "rank", 0)
            rows = [RankEntry(number, row.name, rank, row.active_rank, row.delta_norm) for row in ranks.rows]
            self.record.ranks.extend(rows)

    def _step(self, step: Any, iteration: int, batch: Batch, ctx: TaskContext) -> Tensor:
        try:
            with self.world.reaching():
                return step(iteration, batch)
        except RuntimeError as error:
            if not ran_out_of_memory(error):
                raise
            reason = error.with_traceback(None)  # the frames of the step hold what it computed
        raise RuntimeError(out_of_memory(self, ctx, batch.images)) from reason

    def _context(self, number: int, task: Task, data: MapStyle) -> TaskContext:
        earlier = tuple(self.stream.tasks[: number - 1])
        return TaskContext(
            self.model,
            task,
            number,
            self.config.seed,
            seen_classes=sum(len(task.classes) for task in earlier),
            journal=self._keeper.journal,
            earlier=earlier,
            train=data,
            reference=self.stream.reference,
            tokenizer=self.tokenizer,
            device=self.device,
            base=self._drift.start,
            fixed_shapes=self.config.fixes_shapes,
            world=self.world,
        )

    def _evaluate(self, what: str, known: Evaluation | None = None) -> Evaluation:
        with self._seconds("evaluate"):
            result = known or evaluate(
                self.model,
                self.tokenizer,
                self.stream,
                batch_size=self.config.eval_batch_size,
                dtype=DTYPES[self.config.dtype],
                model_for=self.method.evaluation_model if self.method.per_dataset else None,
                world=self.world,
            )
            drift = self._drift.norm(self.model)
        self.world.check_same((drift, result.own, result.union), f"{what}, the weights and accuracies")
        self.record.add(result.own, result.union, result.held_out, drift)
        self._commit()
        self._keeper.write_record(self.record, self._spent)
        self._loggers.scalars(self._steps, self.record.newest())
        self._progress.line(f"{what}: {self.record.summary()}")
        return result

    @contextlib.contextmanager
    def _seconds(self, what: str) -> Iterator[None]:
        """Wall time of the block, added up under `what` for the manifest."""
        start = time.perf_counter()
        yield
        self._spent[what] = round(self._spent[what] + time.perf_counter() - start, 3)

    def _log(self, ctx: TaskContext, losses: list[Tensor]) -> None:
        """One line with the mean loss since the last one; read here, so a GPU is waited for once in log_every steps."""
        iteration, optimizer = ctx.step["iteration"], ctx.optimizer
        values = torch.stack(losses).tolist()
        for earlier, loss in enumerate(values, start=iteration + 1 - len(values)):
            if not math.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss} at iteration {earlier} (from 0) of task {ctx.number} ({ctx.task.name}); it "
                    f"must be finite. Lower the learning rate ({self.method.config.lr:g}) or look at the images."
                )
        loss = sum(values) / len(values)
        lr, active_rank = optimizer.param_groups[0]["lr"], self.method.active_rank(ctx.model)
        kappa = self.method.kappa(iteration)
        self._keeper.append_log((ctx.number, iteration, loss, lr, kappa, active_rank))
        figures = {"loss": loss, "lr": lr, "kappa": kappa, "active_rank": active_rank}
        self._loggers.scalars(self._steps, {f"train/{name}": value for name, value in figures.items()})
        images = len(ctx.step["labels"])
        self._progress.step(iteration + 1, images=images, loss=loss, kappa=kappa, rank=active_rank)
