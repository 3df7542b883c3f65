"""My own images: a folder of pictures, poisoned, trained on without and with DBD, measured and reported.

The pictures are scanned digits here, so that the script runs in seconds; put your own folder in the place of IMAGES.
The preset "smoke" runs every stage and learns nothing: for results take "cifar10_cpu" or another preset.
"""

# %%
from pathlib import Path

from PIL import Image
from sklearn.datasets import load_digits

from data_prep import BadNets, ImageFolder, PrepareConfig
from dbd_dist import evaluate, open_run, prepare, report, train

IMAGES = Path("images")

# %% IMAGES/train/CLASS/*.png and IMAGES/test/CLASS/*.png
digits = load_digits()
for i, (pixels, label) in enumerate(zip(digits.images[:500], digits.target)):
    folder = IMAGES / ("test" if i % 5 == 0 else "train") / f"digit {label}"
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray((pixels * 15.9).astype("uint8")).save(folder / f"{i}.png")

# %% poison 5 % of the training images with a small patch and the label of the class at position 3
dataset = prepare(
    PrepareConfig(
        source=ImageFolder(root=IMAGES, image_px=16, resize_px=16),
        attack=BadNets(),
        rate=0.05,
        target=3,
    )
)
print(f"{dataset.manifest.poisoned} of {dataset.manifest.counts['train']} images are poisoned: {dataset.folder}")

# %% train in this process; launcher="ray" trains on Ray workers. Running this again resumes or returns the finished run
settings = {"compute.workers": None, "compute.threads": 1}
runs = [train("smoke", method=method, data=dataset.folder, settings=settings) for method in ("none", "dbd")]
for run in runs:
    print(run.title(), "accuracy", run.result["clean_acc"], "attack success", run.result["asr"])

# %% a finished run, later: measure it again, and see which images it suspects most
later = open_run("runs/smoke-dbd-s0")
print("accuracy of each class", evaluate(later).per_class_acc)
print("labels kept:", later.result["kept"], "of them poisoned:", later.result["kept_poisoned"])

# %% the table, and report.html with curves and the suspect images
print(report(runs, out="report.html"))
