/* Play a tape again: at other addresses, on a stream of the caller's.  A part of tape.c. */

/* Tell whether the program's memory is what it was. */
static bool is_stale(struct tape *tape) {
  uint64_t now = atomic_load(&freed);
  if (now == tape->epoch)
    return false;
  pthread_mutex_lock(&lock);
  unsigned there = 0;
  for (unsigned i = 0; i < tape->fixed_count; i++)
    for (size_t j = 0; j < allocated_count; j++)
      there += allocated[j].number == tape->fixed[i].number;
  pthread_mutex_unlock(&lock);
  if (there == tape->fixed_count)
    tape->epoch = now;
  return there != tape->fixed_count;
}

static void relocate(struct tape *tape, struct operation *operation, const uint64_t *addresses) {
  const struct relocation *relocation = tape->relocations + operation->first;
  for (unsigned i = 0; i < operation->relocations; i++, relocation++)
    operation->slot[relocation->slot] = addresses[relocation->buffer] + relocation->offset;
}

static int play_launches(struct tape *tape, const uint64_t *addresses, void *stream) {
  int error = 0;
  for (unsigned i = 0; error == 0 && i < tape->operation_count; i++) {
    relocate(tape, &tape->operations[i], addresses);
    error = issue(&tape->operations[i], stream);
  }
  return error;
}

static bool moves(const struct tape *tape, const struct operation *operation, const uint64_t *from,
                  const uint64_t *to) {
  const struct relocation *relocation = tape->relocations + operation->first;
  for (unsigned i = 0; i < operation->relocations; i++, relocation++)
    if (from[relocation->buffer] != to[relocation->buffer])
      return true;
  return false;
}

static int move(struct tape *tape, struct variant *variant, const uint64_t *addresses) {
  int error = 0;
  for (unsigned i = 0; error == 0 && i < tape->operation_count; i++) {
    struct operation *operation = &tape->operations[i];
    if (!moves(tape, operation, variant->addresses, addresses))
      continue;
    relocate(tape, operation, addresses);
    error = set_node(variant->executable, tape->context, operation);
  }
  if (error == 0)
    memcpy(variant->addresses, addresses, tape->buffer_count * sizeof *addresses);
  return error;
}

static int new_variant(struct tape *tape, struct variant *variant) {
  int error = make_executable(&variant->executable, tape->graph);
  variant->addresses = error ? NULL : calloc(tape->buffer_count + 1, sizeof *variant->addresses);
  if (error != 0 || variant->addresses == NULL)
    return error ? error : NO_MEMORY;
  for (unsigned i = 0; i < tape->buffer_count; i++)
    variant->addresses[i] = tape->buffers[i].base;
  return 0;
}

static void drop_variant(struct variant *variant) {
  if (variant->executable != NULL)
    drop_executable(variant->executable);
  free(variant->addresses);
  *variant = (struct variant){0};
}

/* The variant at these addresses, else a new one, else the one that was not used for longest. */
static struct variant *variant_at(struct tape *tape, const uint64_t *addresses) {
  struct variant *oldest = &tape->variants[0];
  for (unsigned i = 0; i < tape->variant_count; i++) {
    struct variant *variant = &tape->variants[i];
    if (memcmp(variant->addresses, addresses, tape->buffer_count * sizeof *addresses) == 0)
      return variant;
    if (variant->used < oldest->used)
      oldest = variant;
  }
  if (tape->variant_count == VARIANTS)
    return oldest;
  struct variant *made = &tape->variants[tape->variant_count];
  if (new_variant(tape, made) == 0) {
    tape->variant_count++;
    return made;
  }
  drop_variant(made);
  return tape->variant_count ? oldest : NULL;
}

static int play_graph(struct tape *tape, const uint64_t *addresses, void *stream) {
  struct variant *variant = variant_at(tape, addresses);
  if (variant == NULL)
    return play_launches(tape, addresses, stream);
  int error = move(tape, variant, addresses);
  if (error != 0) { /* half of it may have moved */
    drop_variant(variant);
    *variant = tape->variants[--tape->variant_count];
    tape->variants[tape->variant_count] = (struct variant){0};
    return play_launches(tape, addresses, stream);
  }
  variant->used = tape->plays;
  return play_executable(variant->executable, stream);
}

/* Do again on `stream` what was recorded, with the caller's memory at `addresses`; 0, STALE where that cannot be
 * any more, or the driver's error. */
EXPORT int tape_play(struct tape *tape, const uint64_t *addresses, void *stream) {
  pthread_mutex_lock(&tape->lock);
  int error = is_stale(tape) ? STALE : enter(tape->context), captured = 0;
  if (error == 0) {
    tape->plays++;
    error = capturing(stream, &captured);
    tape->captured |= captured != 0;
    if (error == 0)
      error = captured ? play_launches(tape, addresses, stream) : play_graph(tape, addresses, stream);
    leave();
  }
  pthread_mutex_unlock(&tape->lock);
  return error;
}
