from pathlib import Path

from setuptools import setup

setup(
    name="improved-diffusion",
    version="1.0.0",
    description="Improved denoising diffusion probabilistic models: train, sample and measure image diffusion models",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="MIT",
    packages=["improved_diffusion", "improved_diffusion.data"],
    python_requires=">=3.11,<3.12",
    # the ranges hold what the test suite has been run on; constraints.txt has the exact versions
    install_requires=[
        "torch>=2.13,<2.14",
        "numpy>=2.4,<2.5",
        "blobfile>=3.3,<4",
        "mpi4py>=4.1,<5",
        "pillow>=13.0,<14",
        "tqdm>=4.70,<5",
    ],
    extras_require={
        "mpi": ["mpich>=5.0,<6"],
        "demo": ["scikit-learn>=1.9,<2", "matplotlib>=3.11,<4"],
        "tensorboard": ["tensorboard>=2.21,<3"],
        "lsun": ["lmdb>=3.0,<4"],
        "test": [
            "pytest>=9.2,<10",
            "pytest-cov>=7.1,<8",
            "pytest-xdist>=3.8,<4",
            "hypothesis>=6.170,<7",
            "ruff>=0.17,<0.18",
            "mpich>=5.0,<6",
            "scikit-learn>=1.9,<2",
            "matplotlib>=3.11,<4",
            "tensorboard>=2.21,<3",
            "lmdb>=3.0,<4",
        ],
    },
    classifiers=[
        "Programming Language :: Python :: 3.11",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
