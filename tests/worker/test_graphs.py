import numpy as np
import pytest
import torch

from dashinfer.worker.graphs import bucket_sizes
from dashinfer.worker.staging import Download, Staging


@pytest.mark.parametrize("max_batch", [1, 2, 3, 4, 7, 8, 9, 32, 64, 100, 256, 1000])
def test_buckets_fit_every_batch_without_much_padding(max_batch):
    sizes = bucket_sizes(max_batch)

    assert sizes == sorted(set(sizes))
    assert sizes[-1] == max_batch
    for rows in range(1, max_batch + 1):
        size = next(size for size in sizes if size >= rows)
        assert size - rows < max(8, rows / 4) or size == max_batch
    assert len(sizes) < 60


def test_an_upload_keeps_arrays_apart():
    staging = Staging(torch.device("cpu"))
    arrays = [np.arange(5), np.array([], dtype=np.int32), np.arange(100, 140), np.array([7], dtype=np.int64)]
    uploads = [staging.upload([array + turn for array in arrays]) for turn in range(10)]

    for turn, tensors in enumerate(uploads):
        assert [tensor.tolist() for tensor in tensors] == [(array + turn).tolist() for array in arrays]
        assert all(tensor.dtype == torch.int32 for tensor in tensors)


def test_an_upload_into_a_static_tensor():
    staging = Staging(torch.device("cpu"))
    out = torch.full((2, 3), -1, dtype=torch.int32)

    staging.upload_into(out, np.array([[1, 2, 3], [4, 5, 6]]))

    assert out.tolist() == [[1, 2, 3], [4, 5, 6]]


def test_what_is_on_the_host_is_downloaded_already():
    tensor = torch.arange(3)

    assert Download([tensor]).wait()[0].tolist() == [0, 1, 2]


@pytest.mark.feature("Parallelism and recovery", "CUDA graphs")
@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_graphs_replay_what_was_recorded():
    from dashinfer.worker.graphs import DecodeGraphs

    device = torch.device("cuda")
    staging = Staging(device)
    graphs = DecodeGraphs(lambda inputs: inputs.float().square().T, max_batch=9, padding=np.array([-1, 0]), device=device)

    for rows in (1, 3, 9, 2):
        columns = np.arange(2 * rows, dtype=np.int32).reshape(2, rows)
        logits, inputs = graphs(columns, staging)
        assert logits.tolist() == np.square(columns.T).tolist()
        assert inputs.tolist() == columns.tolist()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_uploads_and_downloads_in_flight_do_not_mix():
    device = torch.device("cuda")
    staging = Staging(device)
    busy = torch.randn(4096, 4096, device=device)
    downloads = []
    for turn in range(40):
        busy = busy @ busy * 1e-3
        downloads.append(Download(staging.upload([np.full(1000, turn)])))

    assert [int(download.wait()[0].sum()) for download in downloads] == [1000 * turn for turn in range(40)]
