"""Getting a job onto machines: rented Pods, and what starts the processes there."""

from loadmaster.launch.job import launch_job
from loadmaster.launch.machines import list_pods, sweep_pods

__all__ = ["launch_job", "list_pods", "sweep_pods"]
