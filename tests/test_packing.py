import torch

from cab.packing import document_bounds, document_starts

POSITIONS = torch.tensor([[0, 1, 2, 0, 1], [3, 4, 0, 0, 1]])  # the second row goes on with a document that was cut


def test_documents_start_where_positions_start_again_and_with_each_row() -> None:
    assert document_starts(POSITIONS).long().tolist() == [[1, 0, 0, 1, 0], [1, 0, 1, 1, 0]]


def test_bounds_of_the_rows_end_to_end() -> None:
    bounds = document_bounds(POSITIONS)
    assert bounds.tolist() == [0, 3, 5, 7, 8, 10]
    assert bounds.dtype == torch.int32
