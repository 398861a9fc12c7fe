"""Prefill servers, decode servers and the smg gateway in front of them: on one machine, or its part of a cluster."""

from sgl_flowprefill.cluster.base import ClusterConfig, ClusterError, Ports, StartError
from sgl_flowprefill.cluster.cluster import Cluster

__all__ = ["Cluster", "ClusterConfig", "ClusterError", "Ports", "StartError"]
