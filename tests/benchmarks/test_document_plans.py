from benchmarks import document_plans


def test_a_later_layer_finds_the_plan_of_the_first():
    point = document_plans.measured(documents=300, ranks=2, batches=5)
    assert 0 < point["later_layer_ms"] < point["first_layer_ms"] <= point["first_layer_worst_ms"]
