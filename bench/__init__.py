"""Benchmarks: workloads, load generation, systems to compare, capacity search, metrics, reports, and the simulator."""

if __name__ == "bench":  # imported from the repository's root, past sgl_flowprefill
    from sgl_flowprefill.top_level import stand_aside

    stand_aside(__name__, __file__)
