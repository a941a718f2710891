/* What a HIP kernel takes: the driver does not tell, its code object does.  A part of tape.c. */

struct kernel {
  char name[256];
  void *module, *function;
  unsigned count;
  unsigned char bytes[256];
};

static struct kernel *kernels;
static unsigned kernel_count;

/* A value of MessagePack, in which code objects describe their kernels. */
struct value {
  enum { NUMBER, TEXT, LIST, MAP } type;
  uint64_t number; /* or how many characters, elements, pairs */
  const unsigned char *data;
};

static uint64_t big_endian(const unsigned char *from, unsigned bytes) {
  uint64_t number = 0;
  while (bytes-- > 0)
    number = number << 8 | *from++;
  return number;
}

/* The value at `at`; NULL where there is none, else what is behind its head, and behind a text. */
static const unsigned char *head(const unsigned char *at, const unsigned char *end, struct value *is) {
  if (at == NULL || at >= end)
    return NULL;
  unsigned first = *at++, bytes = 0;
  *is = (struct value){NUMBER, first, at};
  if (first < 0x80 || first >= 0xe0 || first == 0xc0 || first == 0xc2 || first == 0xc3)
    return at;
  if (first < 0xc0)
    *is = (struct value){first < 0x90 ? MAP : first < 0xa0 ? LIST : TEXT, first & (first < 0xa0 ? 15 : 31), at};
  else if (first >= 0xcc && first <= 0xd3)
    bytes = 1u << (first & 3);
  else if (first >= 0xd9 && first <= 0xdb)
    is->type = TEXT, bytes = 1u << (first - 0xd9);
  else if (first >= 0xdc && first <= 0xdf)
    is->type = first < 0xde ? LIST : MAP, bytes = first & 1 ? 4 : 2;
  else
    return NULL; /* a float, bytes or an extension: AMD writes none */
  if ((size_t)(end - at) < bytes)
    return NULL;
  if (bytes > 0)
    is->number = big_endian(at, bytes), at += bytes;
  is->data = at;
  if (is->type != TEXT)
    return at;
  return is->number <= (uint64_t)(end - at) ? at + is->number : NULL;
}

static const unsigned char *past(const unsigned char *at, const unsigned char *end) {
  struct value is;
  at = head(at, end, &is);
  uint64_t inside = is.type == MAP ? 2 * is.number : is.type == LIST ? is.number : 0;
  while (at != NULL && inside-- > 0)
    at = past(at, end);
  return at;
}

static bool text_is(const struct value *text, const char *word) {
  return text->type == TEXT && text->number == strlen(word) && memcmp(text->data, word, text->number) == 0;
}

/* The value under `key` of the map at `at`, or NULL. */
static const unsigned char *under(const unsigned char *at, const unsigned char *end, const char *key) {
  struct value map, name;
  at = head(at, end, &map);
  for (uint64_t i = 0; at != NULL && map.type == MAP && i < map.number; i++) {
    at = head(at, end, &name);
    if (at != NULL && text_is(&name, key))
      return at;
    at = past(at, end);
  }
  return NULL;
}

/* Read how many bytes each argument has; those that the driver adds, at the end, are left out. */
static bool read_arguments(struct kernel *kernel, const unsigned char *at, const unsigned char *end) {
  struct value list, kind, size;
  at = head(at, end, &list);
  if (at == NULL || list.type != LIST)
    return false;
  for (uint64_t i = 0; i < list.number; i++, at = past(at, end)) {
    if (head(under(at, end, ".value_kind"), end, &kind) == NULL || head(under(at, end, ".size"), end, &size) == NULL)
      return false;
    if (kind.type == TEXT && kind.number > 7 && memcmp(kind.data, "hidden_", 7) == 0)
      return true;
    if (kernel->count == 255 || size.number > 255)
      return false;
    kernel->bytes[kernel->count++] = (unsigned char)size.number;
  }
  return true;
}

static void read_kernels(void *module, const unsigned char *at, const unsigned char *end) {
  struct value list, name;
  at = head(under(at, end, "amdhsa.kernels"), end, &list);
  for (uint64_t i = 0; at != NULL && list.type == LIST && i < list.number; i++, at = past(at, end)) {
    struct kernel kernel = {.module = module};
    if (head(under(at, end, ".name"), end, &name) == NULL || name.number >= sizeof kernel.name ||
        !read_arguments(&kernel, under(at, end, ".args"), end))
      continue;
    memcpy(kernel.name, name.data, name.number);
    struct kernel *larger = grown(kernels, kernel_count, sizeof *kernels);
    if (larger == NULL)
      return;
    kernels = larger;
    kernels[kernel_count++] = kernel;
  }
}

static uint64_t field(const unsigned char *at, unsigned bytes) {
  uint64_t number = 0;
  memcpy(&number, at, bytes);
  return number;
}

/* Read the notes of a code object, an ELF file, for what its kernels take. */
static void read_image(void *module, const unsigned char *image) {
  enum { NOTES = 4, METADATA = 32 };
  if (memcmp(image, "\177ELF\2\1", 6) != 0)
    return;
  const unsigned char *segment = image + field(image + 32, 8);
  for (unsigned count = (unsigned)field(image + 56, 2); count > 0; count--, segment += field(image + 54, 2)) {
    if (field(segment, 4) != NOTES)
      continue;
    const unsigned char *note = image + field(segment + 8, 8), *end = note + field(segment + 32, 8);
    while (end - note >= 12) {
      const unsigned char *name = note + 12, *data = name + (field(note, 4) + 3) / 4 * 4;
      uint64_t size = field(note + 4, 4);
      if (data > end || size > (uint64_t)(end - data))
        break;
      if (field(note + 8, 4) == METADATA)
        read_kernels(module, data, data + size);
      note = data + (size + 3) / 4 * 4;
    }
  }
}
