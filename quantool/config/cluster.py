"""The section ``cluster`` of a configuration: where the stages of a run are sent."""

from __future__ import annotations

from pydantic import Field, JsonValue, model_validator

from quantool.config import rules
from quantool.config.section import Section

TIME = r"(\d+-)?\d+(:[0-5]?\d){0,2}"
"""A limit as Slurm writes it."""


class Slurm(Section):
    """What a site's Slurm wants to be told; see sbatch(1)."""

    account: str | None = Field(default=None, min_length=1, description="Account to charge.")
    partition: str | None = Field(default=None, min_length=1, description="Partition.")
    qos: str | None = Field(default=None, min_length=1, description="Quality of service.")
    time: str | None = Field(
        default=None,
        pattern=f"^{TIME}$",
        description="Limit of every job, as Slurm writes it: minutes, h:mm:ss or days-h. Default: three times its estimate.",
    )
    constraint: str | None = Field(default=None, min_length=1, description="Features that nodes must have.")
    reservation: str | None = Field(default=None, min_length=1, description="Reservation.")
    options: dict[str, str | int | bool] = Field(
        default={}, description="Further options of sbatch, without the dashes: {exclusive: true}."
    )
    setup: tuple[str, ...] = Field(
        default=(), description="Shell lines at the start of every job, e.g. module load."
    )


class Local(Section):
    """The GPUs of the machine that submits."""

    jobs: int | None = Field(
        default=None, ge=1, description="Stages at once. Default: one for each GPU, one without."
    )


class Cluster(Section):
    """Where `quantool submit` sends the stages of a run."""

    slurm: Slurm | None = Field(default=None, description="Slurm, through submitit.")
    local: Local | None = Field(default=None, description="This machine, through submitit.")
    engine: str | None = Field(
        default=None,
        min_length=1,
        description="Somebody else's plug-in (entry-point group quantool.clusters).",
    )
    options: dict[str, JsonValue] = Field(default={}, description="What that plug-in wants to be told.")
    gpus_per_node: int | None = Field(
        default=None, ge=0, description="GPUs of a node. Default: as the partition says; this machine's."
    )
    cpus_per_node: int | None = Field(
        default=None,
        ge=1,
        description="Processors of a node. Default: as the partition says; this machine's.",
    )
    memory_per_node: str | None = Field(
        default=None,
        pattern=r"^\d+[GT]$",
        description="Memory of a node, e.g. 512G. Default: as the partition says; this machine's.",
    )

    @model_validator(mode="after")
    def _one_engine(self) -> Cluster:
        if sum(entry is not None for entry in (self.slurm, self.local, self.engine)) != 1:
            raise ValueError(rules.ONE_ENGINE)
        return self

    @property
    def name(self) -> str:
        """``slurm``, ``local`` or the plug-in's."""
        return self.engine or ("slurm" if self.slurm is not None else "local")
