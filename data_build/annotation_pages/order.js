// An order of images: a list of places, the best first; a place holds the numbers of the images that share it. Nothing is
// changed in place.

export const placeOf = (places, image) => places.findIndex((place) => place.includes(image));

export const without = (places, image) =>
  places.map((place) => place.filter((other) => other !== image)).filter((place) => place.length);

export const appended = (places, image) => [...without(places, image), [image]];

// A place of its own before the place `gap` (of the places as they are), or after the last.
export function inserted(places, image, gap) {
  const before = without(places.slice(0, gap), image);
  return [...before, [image], ...without(places.slice(gap), image)];
}

// The place `at`, shared.
export function tied(places, image, at) {
  if (places[at].includes(image)) return places;
  return places
    .map((place, index) => [...place.filter((other) => other !== image), ...(index === at ? [image] : [])])
    .filter((place) => place.length);
}

// One step up (-1) or down (1): out of a shared place into one of its own, or past the next one.
export function moved(places, image, step) {
  const at = placeOf(places, image);
  if (at < 0) return places;
  if (places[at].length > 1) return inserted(places, image, step < 0 ? at : at + 1);
  const other = at + step;
  if (other < 0 || other >= places.length) return places;
  const swapped = [...places];
  [swapped[at], swapped[other]] = [places[other], places[at]];
  return swapped;
}

// Image id -> rank, 1 = best.
export const ranksOf = (places, ids) =>
  Object.fromEntries(places.flatMap((place, at) => place.map((image) => [ids[image], at + 1])));

export function placesOf(ranks, ids) {
  const values = [...new Set(Object.values(ranks))].sort((a, b) => a - b);
  return values.map((value) => ids.map((id, image) => image).filter((image) => ranks[ids[image]] === value));
}
