"""Sub-command samplers: how good samples are, by sampler and evaluations of the network. Resumable, row by row."""

import functools
import hashlib
import json
import os
import time

import numpy as np
import torch as th
from features import Classifier, lite0
from tables import publish

from improved_diffusion import dist_util
from improved_diffusion.cli.parser import Flags
from improved_diffusion.cli.trained import load_trained
from improved_diffusion.image_datasets import open_images
from improved_diffusion.inference.arrays import to_uint8
from improved_diffusion.inference.generate import SampleNoise
from improved_diffusion.metrics import features_of, frechet_distance
from improved_diffusion.options import SampleOptions
from improved_diffusion.respace import space_timesteps
from improved_diffusion.samplers import SAMPLERS, SOLVERS, unipc
from improved_diffusion.script_util import create_model_and_diffusion
from improved_diffusion.solvers import half_log_snr, time_grid
from improved_diffusion.utils.errors import InputError
from improved_diffusion.utils.files import write_files
from improved_diffusion.utils.streams import show

FEW = 20  # evaluations; above, half of the samples
LONG = (100, 250)  # evaluations of the chains beside those of --evaluations
SEED = 0


def samplers(args):
    """Rows that an earlier call of the same settings measured are read from OUT/samplers-KEY.json."""
    bench = Bench(args)
    wanted = [
        (name, count)
        for count in sorted({*args.evaluations, *(() if args.quick else LONG)})
        for name in SAMPLERS
        if count in args.evaluations or name not in SOLVERS
    ]
    for name, count in wanted:
        if not bench.has(name, count):
            bench.add(bench.measure(name, count))
    rows = [bench.halves(), *(bench.rows[key(name, count)] for name, count in wanted)]
    kept = [column for column in rows[-1] if any(row.get(column) is not None for row in rows)]
    publish("samplers", [{column: row.get(column) for column in kept} for row in rows], args, bench.notes)


def key(name, count):
    return f"{name} {count}"


class Bench:
    """A trained model, its data, their features, and the rows so far."""

    def __init__(self, args):
        self.args, self.batch_size = args, args.batch_sizes[0]
        if not os.path.exists(args.model_path):
            raise InputError(f"--model_path {args.model_path}: no such file; make demo trains the digits demo's model")
        if args.num_samples < 4:
            raise InputError(
                f"--num_samples {args.num_samples}: give 4 or more, since distances are of half of them too"
            )
        options = SampleOptions().replace(model_path=args.model_path, batch_size=self.batch_size)
        run, self.model, self.diffusion = load_trained(
            Flags(options, frozenset({"model_path"})), create_model_and_diffusion
        )
        self.options = run.options.model
        model = self.options
        channels, classes = (model.image_channels, model.num_classes), run.class_names
        dataset = open_images(args.data_dir, model.image_size, model.class_cond, *channels, classes)
        self.images, self.labels = np.stack([dataset.pixels(i) for i in range(len(dataset))]), dataset.local_classes
        order = np.random.default_rng(SEED).permutation(len(self.images))
        self.parts = order[::2], order[1::2]
        self.features, self.notes = {}, []
        self.classifier = None
        if self.labels is not None:
            self.classifier = self._classifier()
            self.features["classifier"] = self.classifier.features
        if not args.quick and (network := lite0()):
            self.features["lite0"] = functools.partial(features_of, network=network)
        if not self.features:
            raise InputError(f"--data_dir {args.data_dir}: has no classes; pip install '.[metrics]' for features")
        self.of_data = {name: function(self.images) for name, function in self.features.items()}
        self.path = self._path(run.weights)
        self.rows = self._read()
        self.converged = self._converge()

    def _classifier(self):
        """Fitted to half of the images, half of which are in each of self.parts."""
        fitted, held_out = (np.concatenate([part[i::2] for part in self.parts]) for i in range(2))
        classifier = Classifier(self.images[fitted], self.labels[fitted], steps=10 if self.args.quick else 300)
        read_as_it_is = np.mean(classifier.predict(self.images[held_out]) == self.labels[held_out])
        self.notes.append(
            f"The classifier reads {read_as_it_is:.1%} of the images that it was not fitted to as they are."
        )
        return classifier

    def _path(self, weights):
        """Of the rows: another file for other weights, data or settings."""
        counts = [self.args.num_samples, self.args.converged_samples, self.args.converged_steps]
        settings = [weights, counts, sorted(self.features), SEED]
        digest = hashlib.sha256(json.dumps(settings).encode() + self.images.tobytes()).hexdigest()
        return os.path.join(self.args.out, f"samplers-{digest[:8]}.json")

    def _read(self):
        if self.args.quick or not os.path.exists(self.path):
            return {}
        with open(self.path, encoding="utf-8") as f:
            return json.load(f)

    def has(self, name, count):
        return key(name, count) in self.rows

    def add(self, row):
        self.rows[key(row["sampler"], row["evaluations"])] = row
        text = json.dumps(self.rows, indent=1).encode()
        write_files(os.path.dirname(self.path), {os.path.basename(self.path): lambda f: f.write(text)})
        show(", ".join(f"{column} {value}" for column, value in row.items()))

    def measure(self, name, count):
        """A row of the table."""
        few = count <= FEW
        n = self.args.num_samples if few else -(-self.args.num_samples // 2)
        start = time.perf_counter()
        x = self.draw(name, count, n)
        seconds = time.perf_counter() - start
        images = to_uint8(x).numpy()
        row = {"sampler": name, "evaluations": count, "samples": n, **self.distances(images)}
        if self.options.class_cond and self.classifier is not None:
            row["as asked"] = float(np.mean(self.classifier.predict(images) == self._classes(range(n)).numpy()))
        if name not in ("ancestral", "dpm++2m-sde"):
            reference = self.converged["solver" if name in SOLVERS else "chain"]
            row["to converged"] = float((x[: len(reference)] - reference[: len(x)]).square().mean().sqrt())
        return {**row, "s/sample": seconds / n}

    def distances(self, images, others=None):
        """The Fréchet distance of each feature to the data or to other images; of as many samples in every row too."""
        found, equal = {}, -(-self.args.num_samples // 2)
        for name, function in self.features.items():
            of_images = function(images)
            reference = self.of_data[name] if others is None else function(others)
            found[f"FD, {name}"] = frechet_distance(of_images, reference)
            found[f"FD, {name}, {equal}"] = frechet_distance(of_images[:equal], reference)
        return found

    def halves(self):
        first, second = (self.images[part] for part in self.parts)
        return {"sampler": "half of the data, to the other", "samples": len(first), **self.distances(first, second)}

    def draw(self, name, count, n):
        """Samples 0 to n - 1, float32 [n, C, H, W]: x_T, noise and class depend on the index alone."""
        steps = dict(steps=count)
        if name not in SOLVERS:
            steps = dict(timesteps=sorted(space_timesteps(self.diffusion.num_timesteps, count), reverse=True))
        return self._in_batches(
            n, lambda x_T, **kwargs: SAMPLERS[name](self.diffusion, self.model, x_T, **steps, **kwargs)
        )

    @th.inference_mode()
    def _in_batches(self, n, draw):
        drawn = []
        for start in range(0, n, self.batch_size):
            numbers = range(start, min(start + self.batch_size, n))
            noise_fn = SampleNoise(SEED, numbers)
            size = self.options.image_size
            x_T = noise_fn(th.empty(len(numbers), self.options.image_channels, size, size, device=dist_util.dev()))
            y = {"y": self._classes(numbers).to(x_T.device)} if self.options.class_cond else {}
            drawn.append(draw(x_T, noise_fn=noise_fn, model_kwargs=y).cpu())
        return th.cat(drawn)

    def _classes(self, numbers):
        """Of samples: in the data's proportions, among the first n too (a golden section of the sorted labels)."""
        places = (np.asarray(numbers) * (5**0.5 - 1) / 2) % 1
        return th.from_numpy(np.sort(self.labels)[(places * len(self.labels)).astype(int)])

    def _converge(self):
        """
        The deterministic solutions from the first x_T, by UniPC in many steps: as solvers start and end, and as the
        chains do, from the noisiest timestep to x_0.
        """
        steps, n = self.args.converged_steps, self.args.converged_samples
        grid = time_grid(half_log_snr(self.diffusion), steps)
        whole = sorted({self.diffusion.num_timesteps - 1, *grid}, reverse=True)

        def solution(timesteps):
            def draw(x_T, noise_fn, model_kwargs):
                kwargs = dict(steps=steps, timesteps=timesteps, model_kwargs=model_kwargs)
                return unipc(self.diffusion, self.model, x_T, **kwargs)

            return self._in_batches(n, draw)

        self.notes.append(
            f"To converged: root mean square, pixels from -1 to 1, over {n} x_T, to UniPC in {steps} evaluations."
        )
        return {"solver": solution(None), "chain": solution(whole)}
