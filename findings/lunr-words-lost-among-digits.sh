#!/usr/bin/env bash
# lunr 2.3.9 (the search of MkDocs and Material for MkDocs), Node 20 and Chromium 156, seen 2026-11-28.
#
# Guess: after building an index, every word in its token set has an entry in its inverted index, and the other way
#        round; a search for a prefix finds the words that begin with it.
# Seen:  with 3,000 words such as 559–571 (lines of a file), a few are replaced in the token set by words that no
#        document holds (559–57139), and a search for their prefix raises
#        TypeError: Cannot read properties of undefined (reading '_index').
#        Nodes of the automaton are told apart by a string that joins labels and numbers of nodes without anything
#        between them; where labels are digits, two different nodes have the same string and are merged.
# Where it hurts: sites whose pages hold many ranges of lines, dates or versions: typing a letter fails.
#
# Installs a pinned package into a temporary folder; needs Node and npm. Fails if the behaviour changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
npm init --yes >/dev/null
npm install --silent lunr@2.3.9 >/dev/null
node - <<'JAVASCRIPT'
const lunr = require("lunr")
let state = 1
const below = (limit) => Math.floor(((state = (state * 48271) % 2147483647) / 2147483647) * limit)
const words = new Set()
while (words.size < 3000) {
  const first = 1 + below(700)
  words.add(`${first}–${first + below(40)}`)
}
const index = lunr(function () {
  this.ref("id")
  this.field("text")
  this.pipeline.reset()
  this.searchPipeline.reset()
  ;[...words].forEach((text, id) => this.add({ id, text }))
})
const invented = index.tokenSet.toArray().filter((word) => !words.has(word))
let raised = "nothing"
try {
  index.query((query) => query.term(invented[0].slice(0, 2), { wildcard: lunr.Query.wildcard.TRAILING }))
} catch (error) {
  raised = String(error)
}
console.log(`lunr ${lunr.version}: ${invented.length} words of the token set are in no document, such as ${invented[0]};`)
console.log(`a search for words that begin with ${invented[0].slice(0, 2)} raises ${raised}`)
if (!invented.length || !raised.includes("_index")) throw new Error("the behaviour has changed")
JAVASCRIPT
