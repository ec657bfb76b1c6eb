"""A mapping in the object store, as tasks see it."""

import ray
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline import cluster
from pipeline.config import Config
from pipeline.lookup import Lookup

names = st.text(st.characters(codec="utf-8"), max_size=8)


@settings(max_examples=50)
@given(values=st.dictionaries(names, names | st.just("\udcff"), max_size=20), other=names)
def test_a_lookup_gives_what_the_mapping_gives(values, other):
    cluster.connect(Config())
    found = Lookup(values)
    for key in (*values, other):
        assert found.get(key, "none") == values.get(key, "none")


def test_a_task_looks_into_the_one_that_it_is_given():
    cluster.connect(Config())
    lookup = Lookup({f"unit{index}": index for index in range(1000)})
    task = ray.remote(num_cpus=0)(lambda given: [given.get(f"unit{i}", -1) for i in (7, 1000)])
    assert ray.get(task.remote(lookup)) == [7, -1]
