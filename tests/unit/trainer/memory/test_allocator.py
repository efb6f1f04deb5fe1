"""The rules of the caching allocator that affect the peak."""

import random

from trainer.memory.allocator import MIB, CachingAllocator


def test_sizes_are_rounded_up_to_512_bytes():
    allocator = CachingAllocator()
    allocator.allocate(1)
    allocator.allocate(513)
    assert allocator.allocated == 512 + 1024


def test_small_tensors_share_a_segment_of_2_mib():
    allocator = CachingAllocator()
    for _ in range(4):
        allocator.allocate(MIB // 2)
    assert allocator.reserved == 2 * MIB
    allocator.allocate(MIB // 2)
    assert allocator.reserved == 4 * MIB


def test_middle_sizes_share_20_mib_and_large_ones_are_rounded_to_2_mib():
    allocator = CachingAllocator()
    for _ in range(3):
        allocator.allocate(6 * MIB)
    assert allocator.reserved == 20 * MIB
    allocator.allocate(11 * MIB)
    assert allocator.reserved == 20 * MIB + 12 * MIB


def test_freed_neighbours_join_and_are_used_again():
    allocator = CachingAllocator()
    handles = [allocator.allocate(6 * MIB) for _ in range(3)]
    for handle in (handles[1], handles[0], handles[2]):
        allocator.free(handle)
    allocator.allocate(19 * MIB)
    assert (allocator.reserved, allocator.allocated) == (
        20 * MIB,
        20 * MIB,
    )  # the last MiB is too small to split off


def test_a_hole_that_is_too_small_makes_a_new_segment():
    allocator = CachingAllocator()
    first, _second = allocator.allocate(12 * MIB), allocator.allocate(12 * MIB)
    allocator.free(first)
    allocator.allocate(14 * MIB)
    assert (allocator.allocated, allocator.reserved) == (26 * MIB, 38 * MIB)


def test_what_is_freed_is_gone_whatever_the_order():
    allocator, draw, held = CachingAllocator(), random.Random(3), []
    for _ in range(2000):
        if held and draw.random() < 0.5:
            allocator.free(held.pop(draw.randrange(len(held))))
        else:
            held.append(allocator.allocate(draw.choice([100, 5000, 3 * MIB, 15 * MIB])))
    for handle in held:
        allocator.free(handle)
    before = allocator.reserved
    assert allocator.allocated == 0 < allocator.peak_allocated <= before
    allocator.allocate(15 * MIB)
    assert allocator.reserved == before
