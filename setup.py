"""Puts conf/, recipes/, data/ and launch/ into the wheel; everything else about the package is in pyproject.toml.

They stand at the top of the repository, where people edit them, and are installed inside the package as
loadmaster/_shipped/{conf,recipes,data,launch}, where loadmaster/config/shipped.py finds them.
"""

from setuptools import find_packages, setup

SHIPPED = {f"loadmaster._shipped.{folder}": folder for folder in ("conf", "recipes", "data", "launch")}

setup(
    packages=[*find_packages(include=["loadmaster", "loadmaster.*"]), *SHIPPED],
    package_dir={"loadmaster": "loadmaster", **SHIPPED},
    package_data={
        "": [
            *(f"**/*.{suffix}" for suffix in ("yaml", "json", "jsonl", "html", "j2", "css", "js", "md", "sh", "txt")),
            *("**/*.sbatch", "**/Dockerfile"),
        ],
    },
    include_package_data=False,
)
