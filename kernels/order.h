// What is first in order, equal ones in the order that eager PyTorch gives them on a CPU.
//
// PyTorch leaves that order to the C++ library it is built with: a partial sort by heap where few are asked for, else a
// partition around the last one, after which those before it are sorted.  Neither keeps equals in order, so what moves
// where is part of the result: the steps here are those of libstdc++, one by one.  Routers with 16-bit scores have ties
// in most batches.
//
// Who includes this defines Entry, with a `key` of a type that compares: the smallest comes first.

// Longer runs than this a sort partitions, shorter ones it inserts into.
#define RUN 16

INLINE int before(Entry a, Entry b) { return a.key < b.key; }

INLINE void swap(Entry *a, Entry *b) {
  Entry held = *a;
  *a = *b;
  *b = held;
}

// -- heaps: the last in order at the root ----------------------------------------------------------

// Puts `value` where there is a hole: the hole sinks to a leaf, then `value` rises from it.
static void fill_hole(Entry *heap, int hole, int count, Entry value) {
  int top = hole, child = hole;
  while (child < (count - 1) / 2) {
    child = 2 * (child + 1);
    if (before(heap[child], heap[child - 1])) --child;
    heap[hole] = heap[child];
    hole = child;
  }
  if ((count & 1) == 0 && child == (count - 2) / 2) {
    child = 2 * (child + 1);
    heap[hole] = heap[child - 1];
    hole = child - 1;
  }
  for (int parent = (hole - 1) / 2; hole > top && before(heap[parent], value); parent = (hole - 1) / 2) {
    heap[hole] = heap[parent];
    hole = parent;
  }
  heap[hole] = value;
}

static void make_heap(Entry *heap, int count) {
  for (int parent = (count - 2) / 2; count > 1 && parent >= 0; --parent) fill_hole(heap, parent, count, heap[parent]);
}

static void sort_heap(Entry *heap, int count) {
  while (count > 1) {
    --count;
    Entry value = heap[count];
    heap[count] = heap[0];
    fill_hole(heap, 0, count, value);
  }
}

// -- partitions ------------------------------------------------------------------------------------

// Puts the median of the second, the middle and the last of a run first.
static void median_first(Entry *first, Entry *last) {
  Entry *a = first + 1, *b = first + (last - first) / 2, *c = last - 1;
  if (before(*a, *b))
    swap(first, before(*b, *c) ? b : before(*a, *c) ? c : a);
  else
    swap(first, before(*a, *c) ? a : before(*b, *c) ? c : b);
}

// Parts a run around its first: where the second part begins.
static Entry *partition(Entry *first, Entry *last) {
  median_first(first, last);
  Entry pivot = *first++;
  for (;; ++first) {
    while (before(*first, pivot)) ++first;
    --last;
    while (before(pivot, *last)) --last;
    if (first >= last) return first;
    swap(first, last);
  }
}

// Moves `*at` before those that it precedes, of which the first is not before `*start`.
static void insert(Entry *start, Entry *at) {
  Entry value = *at;
  while (at > start && before(value, at[-1])) {
    *at = at[-1];
    --at;
  }
  *at = value;
}

static void insertion_sort(Entry *first, Entry *last) {
  for (Entry *at = first + 1; at < last; ++at) insert(first, at);
}

static int depth_of(i64 count) {
  int depth = 0;
  while (count >>= 1) depth += 2;
  return depth;
}

// Keeps in `heap`, `count` long, the first in order of it and of what follows up to `last`.
static void select_by_heap(Entry *heap, int count, Entry *last) {
  make_heap(heap, count);
  for (Entry *at = heap + count; at < last; ++at)
    if (before(*at, heap[0])) {
      Entry value = *at;
      *at = heap[0];
      fill_hole(heap, 0, count, value);
    }
}

// Runs of RUN and fewer, in order of each other; too deep a recursion ends in a sort by heap.
static void sort_roughly(Entry *first, Entry *last, int depth) {
  while (last - first > RUN) {
    if (depth-- == 0) {
      make_heap(first, last - first);
      sort_heap(first, last - first);
      return;
    }
    Entry *second = partition(first, last);
    sort_roughly(second, last, depth);
    last = second;
  }
}

static void sort(Entry *first, Entry *last) {
  sort_roughly(first, last, depth_of(last - first));
  insertion_sort(first, last);
}

// Brings to `nth` what is there in order, and before it what precedes it.
static void part_at(Entry *first, Entry *nth, Entry *last) {
  int depth = depth_of(last - first);
  while (last - first > 3) {
    if (depth-- == 0) {
      select_by_heap(first, nth + 1 - first, last);
      swap(first, nth);
      return;
    }
    Entry *second = partition(first, last);
    if (second <= nth)
      first = second;
    else
      last = second;
  }
  insertion_sort(first, last);
}

// Whether torch.topk takes so few that it keeps a heap of them.
#define KEEPS_FEW(count, elements) ((count) * 64 <= (elements))

// Brings the `count` first of all to the front, in order unless `is_sorted` says otherwise: as torch.topk does.
static void bring_first(Entry *entries, int count, int elements, int is_sorted) {
  if (KEEPS_FEW(count, elements)) {
    select_by_heap(entries, count, entries + elements);
    sort_heap(entries, count);
  } else {
    part_at(entries, entries + count - 1, entries + elements);
    if (is_sorted) sort(entries, entries + count - 1);
  }
}
