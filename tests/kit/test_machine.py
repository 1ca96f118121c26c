"""How a GPU is kept busy, on a CPU: CUDA graphs are played by Python."""

import contextlib

import torch

from kit import machine


def test_python_computes_two_tensors_of_a_shape_and_graphs_the_others(monkeypatch, compared):
    """Each of four shapes has a graph of its own, all share memory, and no result is overwritten
    later."""
    called, capturing, pools = [], [], []

    def double(x):
        called.append(len(x))
        y = x * 2
        if capturing:
            capturing[0].replay = lambda: y.copy_(x * 2)
        return y

    class Graph:
        def pool(self):
            return "pool"

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        assert capture_error_mode == "thread_local"  # other threads copy to and from the GPU
        pools.append(pool)
        capturing.append(graph)
        yield
        capturing.pop()

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    graphs = machine.Graphs(4)
    lengths = [3, 3, 5, 3, 5, 5, 3, 7, 7, 8, 8, 9, 9, 9, 3]
    inputs = [torch.full((length,), float(n)) for n, length in enumerate(lengths)]
    results = [graphs.run(double, x) for x in inputs]
    assert all(torch.equal(result, x * 2) for result, x in zip(results, inputs))
    assert called == [3, 3, 5, 5, 7, 7, 8, 8, 9, 9, 9]  # the fifth shape has no graph
    assert pools == [None, "pool", "pool", "pool"]
    compared(len(lengths), "tensors")


def test_tensors_arrive_in_order(compared):
    """On a CPU at once: nothing is computed ahead."""
    computed = []

    def compute():
        for n in range(4):
            computed.append(n)
            yield n, torch.full((2,), n)

    for n, tensor in machine.on_host(compute()):
        assert computed == list(range(n + 1)) and tensor.tolist() == [n, n]
    compared(len(computed), "tensors")
