"""The loop of plain torch."""


def test_a_loop_of_plain_torch_trains_as_fit_does(case, example):
    example("torch_loop").train(case.distiller, case.loader, case.epochs)
    assert case.same_as_fit()
