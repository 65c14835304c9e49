"""Which prompts a task asks for: exact products, stable seeds, prefixes, and clear refusals."""

from collections import Counter

import pytest
from conftest import WORLD

from erasebench.contracts import ErasebenchError, Unknown
from erasebench.tasks import (
    CaptionTask,
    CelebrityTask,
    ExplicitTask,
    ImagenetteTask,
    ObjectTask,
    StyleTask,
    TermsTask,
    asked,
    in_other_words,
    misspelt,
    seed_of,
    shown,
    spread,
    together,
    turned,
)


def test_the_papers_product_comes_out_exactly():
    """MACE, 100 celebrities: names x 5 patterns x 5 seeds, each once."""
    names = {f"Person {i}": f"Person {i}" for i in range(100)}
    templates = [f"pattern {i} of {{c}}" for i in range(5)]
    prompts = spread("retain", names, templates, 2500)
    assert len({(p.text, p.seed) for p in prompts}) == 2500 and len({p.id for p in prompts}) == 2500
    assert set(Counter(p.text for p in prompts).values()) == {5}
    assert set(Counter(p.concept for p in prompts[:120]).values()) == {1, 2}  # any prefix is balanced


def test_seeds_belong_to_the_prompt_and_to_nothing_else():
    few = spread("retain", {"a": "a"}, ["x {c}"], 3)
    many = spread("retain", {"b": "b", "a": "a"}, ["x {c}"], 6)
    assert [(p.text, p.seed) for p in few] == [(p.text, p.seed) for p in many if p.concept == "a"]
    assert len({p.seed for p in few}) == 3 and all(0 <= p.seed < 2**31 for p in few)
    assert seed_of("a", 1) == seed_of("a", 1) != seed_of("a", 2)


def test_object_task():
    plan = ObjectTask().plan(WORLD, None, "cat", None)
    by = Counter(p.split for p in plan.prompts)
    assert by == {"target": 5, "retain": 4, "synonym": 3, "caption": 3}
    assert plan.concepts[0].surrogate == "sky" and plan.brief.preserved == ("airplane", "dog")
    assert {p.concept for p in plan.prompts if p.split == "synonym"} == {"cat"}
    assert {p.text for p in plan.prompts if p.split == "synonym"} == {
        f"a photo of the {w}" for w in ("kitty", "feline", "housecat")
    }
    assert "cat" not in {p.concept for p in plan.prompts if p.split == "retain"}
    assert not plan.subset and not set(plan.brief.captions) & {p.text for p in plan.prompts}


def test_terms_are_asked_for_by_name_and_synonyms_of_the_erased_and_of_the_others():
    plan = TermsTask().plan(WORLD, None, "cat", None)
    texts = lambda split: Counter(p.text for p in plan.prompts if p.split == split)
    assert texts("target") == {"a photo of cat": 2, "a photo of kitty": 2}
    assert texts("retain") == {"a photo of plane": 3, "a photo of airplane": 3}
    assert [c.name for c in plan.concepts] == ["cat"] and plan.brief.preserved == ("plane",)
    with pytest.raises(ErasebenchError, match="unknown target 'airplane': did you mean plane"):
        TermsTask().plan(WORLD, None, "airplane", None)  # erased by its group's first term


def test_prompts_of_one_s_own_take_the_place_of_those_that_ask_for_the_same(tmp_path):
    plan, path = ObjectTask().plan(WORLD, None, "cat", None), tmp_path / "own.csv"
    path.write_text("prompt,concept,seed\na cat asleep,cat,7\na boy with a cat,cat,8\nmy cat,cat,9\n")
    own = asked(plan, {"path": str(path), "each": 2}, None)
    target = [(p.text, p.seed) for p in own.prompts if p.split == "target"]
    assert target[:2] == [("a cat asleep", 7), ("my cat", 9)] and len(set(target)) == 4 and own.dropped == 1
    assert {p.concept for p in own.prompts if p.split == "target"} == {"cat"}
    rest = lambda plan: [p for p in plan.prompts if p.split != "target"]
    assert rest(own) == rest(plan)  # nothing of one's own asks for what is kept
    assert asked(plan, {"path": str(path), "each": 1}, 1).prompts[0].text == "a cat asleep"
    path.write_text("prompt,concept\na cat,cat\nmy cat,cat\n")
    seeds = [p.seed for p in asked(plan, {"path": str(path), "each": 2}, None).prompts if p.split == "target"]
    assert len(set(seeds)) == 4 and seeds == [seed_of(text, i) for i in (0, 1) for text in ("a cat", "my cat")]
    path.write_text("prompt,concept\na cat,cat\na cat,cat\n")
    twice = [p.seed for p in asked(plan, {"path": str(path), "each": 2}, None).prompts if p.split == "target"]
    assert len(set(twice)) == 4
    path.write_text("prompt,concept,seed\na cat,cat,1\na whale,whale,2\n")
    with pytest.raises(ErasebenchError, match="row 1: concept 'whale' is neither erased nor kept"):
        asked(plan, {"path": str(path), "each": 1}, None)


def own(plan, path, content, **spec):
    path.write_text(content)
    made = asked(plan, {"path": str(path), "each": 1, **spec}, None)
    return [(p.split, p.concept, p.seed, p.guidance) for p in made.prompts if "/own/" in p.id]


def test_a_table_by_type_or_without_concepts(tmp_path):
    """MACE's tables say erased or preserved, or 0 or 1; where one concept is erased a table can be all its."""
    path, people = tmp_path / "own.csv", CelebrityTask(sizes=(3,)).plan(WORLD, 3, None, None)
    table = ",type,prompt,evaluation_seed\n0,{},A portrait of Bill Moss,1\n1,{},a sketch of tom reed,2\n"
    for marks in (("erased", "preserved"), (0, 1)):
        found = own(people, path, table.format(*marks))
        assert found == [("target", "Bill Moss", 1, None), ("retain", "Tom Reed", 2, None)]
    cat = ObjectTask().plan(WORLD, None, "cat", None)
    guided = "case_number,prompt,evaluation_seed,evaluation_guidance\n0,a kitty and a dog,3,9.5\n"
    assert own(cat, path, guided) == [("target", "cat", 3, None)]
    assert own(cat, path, guided, guidance="row") == [("target", "cat", 3, 9.5)]
    explicit = ExplicitTask().plan(WORLD, None, None, None)
    assert own(explicit, path, "prompt,seed\nthe old chimney,3\n") == [("target", "", 3, None)]
    assert own(people, path, "prompt,Celebrity\nhe,bill moss\n")[0][:2] == ("target", "Bill Moss")


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ("type,prompt\nerased,A portrait of Bill Moss\nerased,nobody\n", "row 1: the prompt names nothing"),
        ("type,prompt\nerased,Bill Moss and Ann Reed\n", "row 0: the prompt names 'Bill Moss', 'Ann Reed'"),
        ("type,prompt\npreserved,Bill Moss\n", "row 0: type 'preserved', but 'Bill Moss' is erased"),
        ("type,prompt\nerased,Tom Reed\n", "row 0: type 'erased', but 'Tom Reed' is kept"),
        ("type,prompt\nodd,Tom Reed\n", "row 0: type 'odd': erased"),
        ("prompt,seed\nA portrait of Bill Moss,1\n", "no column concept or class or artist, nor type"),
        ("prompt,concept,seed\na boy,Bill Moss,1\n", "the safety gate refuses all"),
    ],
)
def test_a_table_that_does_not_say_what_it_asks_for_is_refused(tmp_path, rows, said):
    with pytest.raises(ErasebenchError, match=said):
        own(CelebrityTask(sizes=(3,)).plan(WORLD, 3, None, None), tmp_path / "own.csv", rows)


def test_a_table_without_concepts_may_not_ask_for_what_is_kept(tmp_path):
    with pytest.raises(ErasebenchError, match="row 1: no column concept, and the prompt names 'dog', which is kept"):
        own(ObjectTask().plan(WORLD, None, "cat", None), tmp_path / "own.csv", "prompt\na cat\na dog\n")


def test_seeds_of_texts_that_stand_several_times(tmp_path):
    """As they always were: the k-th time that a text stands counts on from its k-th image."""
    texts = ["a cat", "my cat", "a cat", "a cat", "my cat"]
    plan = ObjectTask().plan(WORLD, None, "cat", None)
    path = tmp_path / "own.csv"
    path.write_text("prompt,concept\n" + "".join(f"{text},cat\n" for text in texts))
    made = [p for p in asked(plan, {"path": str(path), "each": 2}, None).prompts if p.split == "target"]
    expected = [seed_of(text, texts[:k].count(text) * 2 + i) for i in range(2) for k, text in enumerate(texts)]
    assert [p.seed for p in made] == expected and len({(p.text, p.seed) for p in made}) == 10


def test_captions_keep_the_seeds_of_their_table():
    world = {**WORLD, "captions": {**WORLD["captions"], "seeds": [5, 6, 7, 8]}}
    seeds = lambda world: [p.seed for p in ObjectTask().plan(world, None, "cat", None).prompts if p.split == "caption"]
    assert seeds(world) == [5, 6, 7]
    assert seeds(WORLD) == [seed_of("caption", i, text) for i, text in enumerate(WORLD["captions"]["evaluation"][:3])]


def test_an_object_of_one_s_own():
    world = lambda entry: {**WORLD, "objects": {**WORLD["objects"], "unicorn": entry}}
    plan = ObjectTask().plan(world({"surrogate": "horse"}), None, "unicorn", None)
    assert plan.concepts[0].surrogate == "horse" and "synonym" not in {p.split for p in plan.prompts}
    for entry in ("horse", {"synonyms": ["x"]}, {"surrogate": 7}):
        with pytest.raises(ErasebenchError, match="world.objects.unicorn has no surrogate"):
            ObjectTask().plan(world(entry), None, "unicorn", None)
    for task in (ObjectTask(), CelebrityTask(), StyleTask(), ImagenetteTask(), CaptionTask()):
        with pytest.raises(Unknown, match="kind= is needed: object, person, style or explicit"):
            task.plan(WORLD, None, "Newt", None)


def test_celebrity_task_takes_the_published_subsets():
    task = CelebrityTask(sizes=(1, 3))
    assert [c.name for c in task.plan(WORLD, 1, None, None).concepts] == ["Bill Stone"]  # the last one, as published
    plan = task.plan(WORLD, 3, None, None)
    assert [c.name for c in plan.concepts] == WORLD["people"]["erase"]
    assert Counter(p.concept for p in plan.prompts if p.split == "target") == {n: 2 for n in WORLD["people"]["erase"]}
    assert [c.name for c in task.plan(WORLD, None, "Ann Reed", None).concepts] == ["Ann Reed"]


def test_a_cap_is_a_prefix_of_every_split():
    whole, capped = ObjectTask().plan(WORLD, None, None, None), ObjectTask().plan(WORLD, None, None, 2)
    assert capped.subset
    for split in ("target", "retain", "synonym", "caption"):
        full = [p for p in whole.prompts if p.split == split]
        assert [p for p in capped.prompts if p.split == split] == full[:2]


@pytest.mark.parametrize(
    "task,n,target,images,message",
    [
        (ObjectTask(), 2, None, None, "erases one class"),
        (ObjectTask(), None, "aeroplane", None, "unknown target 'aeroplane': did you mean airplane"),
        (ObjectTask(), None, "zzz", None, "choose from airplane, cat, dog"),
        (ObjectTask(), None, None, 0, "at least one image"),
        (CelebrityTask(), 7, None, None, "erases 1, 5, 10, 100 people"),
        (CelebrityTask(), 5, "Bill Moss", None, "erased alone"),
        (CelebrityTask(), None, "Tom Reed", None, "unknown target"),
    ],
)
def test_what_the_world_does_not_have_is_refused(task, n, target, images, message):
    with pytest.raises(ErasebenchError, match=message):
        task.plan(WORLD, n, target, images)


def test_imagenette_erases_a_split_or_one_class():
    plan = ImagenetteTask(split=1).plan(WORLD, None, None, None)
    assert [c.name for c in plan.concepts] == ["church", "tench"] and plan.which == "split 1"
    assert {p.concept for p in plan.prompts if p.split == "retain"} == {"gas pump", "golf ball"}
    alone = ImagenetteTask().plan(WORLD, None, "tench", None)
    assert [c.name for c in alone.concepts] == ["tench"] and len(alone.brief.preserved) == 3
    for wrong in ((ImagenetteTask(split=9), None, None), (ImagenetteTask(), 3, None), (ImagenetteTask(), 2, "tench")):
        with pytest.raises(ErasebenchError):
            wrong[0].plan(WORLD, wrong[1], wrong[2], None)


def test_style_keeps_the_other_list_or_the_others_of_those_erased_one_by_one():
    plan = StyleTask().plan(WORLD, None, None, None)
    assert [c.name for c in plan.concepts] == ["Aldo", "Bea"] and plan.brief.preserved == ("Cy", "Di")
    assert [c.name for c in StyleTask().plan(WORLD, 1, None, None).concepts] == ["Aldo"]
    one = StyleTask().plan(WORLD, None, "Monet", None)
    assert [c.name for c in one.concepts] == ["Monet"] and one.brief.preserved == ("Klee",)


def test_explicit_prompts_name_the_hazard_or_only_imply_it():
    plan = ExplicitTask().plan(WORLD, None, None, None)
    assert [c.name for c in plan.concepts] == ["hazard"] and plan.which == "explicit content"
    assert {p.text for p in plan.prompts if p.split == "target"} == {"a photo of a fire", "a photo of a bomb"}
    assert {p.text: p.concept for p in plan.prompts if p.split == "implicit"} == {"the old chimney": "fire"}
    assert [p.text for p in plan.prompts if p.split == "retain"] == ["a photo of the cat", "a photo of the dog"]
    assert plan.brief.preserved == ()  # measured, and no method is told
    with pytest.raises(ErasebenchError, match="one group of phrases"):
        ExplicitTask().plan(WORLD, 3, None, None)


def test_i2p_comes_with_its_seeds_and_guidance_and_the_gate_drops(tmp_path):
    (tmp_path / "i2p.csv").write_text(
        "prompt,sd_seed,sd_guidance_scale\na street,7,9.5\na child,8,7\n,9,255\n", encoding="utf-8"
    )
    world = {**WORLD, "explicit": {**WORLD["explicit"], "prompts": {"path": str(tmp_path / "i2p.csv")}}}
    plan = ExplicitTask(guidance="row", each=2).plan(world, None, None, None)
    shown = [p for p in plan.prompts if p.split == "target"]
    assert plan.dropped == 1 and [(p.text, p.guidance) for p in shown] == [("a street", 9.5), ("", 255.0)] * 2
    assert [p.seed for p in shown[:2]] == [7, 9] and len({p.seed for p in shown}) == 4
    fixed = ExplicitTask().plan(world, None, None, None)
    assert all(p.guidance is None for p in fixed.prompts) and len({p.id for p in fixed.prompts}) == len(fixed.prompts)


def test_captions_alone_erase_the_phrases_or_anything_by_name():
    plan = CaptionTask().plan(WORLD, None, None, None)
    assert {p.split for p in plan.prompts} == {"caption"} and plan.concepts[0].kind == "explicit"
    assert CaptionTask().plan(WORLD, None, "Ann Reed", None).concepts[0].kind == "person"
    with pytest.raises(ErasebenchError, match="did you mean Ann Reed"):
        CaptionTask().plan(WORLD, None, "Ann Read", None)
    with pytest.raises(ErasebenchError, match="no captions"):
        CaptionTask().plan({**WORLD, "captions": {"count": 0, "evaluation": [], "training": []}}, None, None, None)


def test_several_concepts_at_once_are_not_kept_any_more():
    plan = together(ObjectTask().plan(WORLD, None, "cat", None), WORLD, ["dog", "Aldo", "cat"])
    assert [(c.name, c.kind) for c in plan.concepts] == [("cat", "object"), ("dog", "object"), ("Aldo", "style")]
    assert [c.name for c in plan.brief.concepts] == ["cat", "dog", "Aldo"] and plan.brief.preserved == ("airplane",)
    assert {p.concept for p in plan.prompts if p.split == "retain"} == {"airplane"}
    assert plan.which == "cat + dog + Aldo"


def test_another_surrogate_is_another_plan_for_methods_and_says_so():
    plan = turned(ObjectTask().plan(WORLD, None, "cat", None), ["dog"])
    assert plan.concepts[0].surrogate == plan.brief.concepts[0].surrogate == "dog"
    assert plan.which == "cat -> dog" and "dog" in plan.brief.preserved  # dogs stay dogs
    two = turned(together(ObjectTask().plan(WORLD, None, "cat", None), WORLD, ["Bea"]), ["art"])
    assert two.which == "cat + Bea -> art" and {c.surrogate for c in two.brief.concepts} == {"art"}
    either = turned(ObjectTask().plan(WORLD, None, "cat", None), ["dog", "airplane"])
    assert [(c.name, c.surrogate) for c in either.brief.concepts] == [("cat", "dog"), ("cat", "airplane")]
    assert len(either.concepts) == 1 and either.which == "cat -> dog, airplane"
    with pytest.raises(ErasebenchError, match="at least one"):
        turned(ObjectTask().plan(WORLD, None, "cat", None), [])


def test_a_slip_is_small_and_keeps_the_first_letter():
    assert misspelt("airplane") == ["airpalne", "airpane", "airpllane"]
    assert misspelt("gas pump") == ["gas pupm", "gas pup", "gas pummp"]
    assert misspelt("bee") == ["be", "beee"]  # two equal letters cannot be swapped
    assert all(m[0] == "O" for m in misspelt("Ox")) and misspelt("Ox")


def test_other_words_are_further_splits_judged_as_the_concept():
    plan = ObjectTask().plan(WORLD, None, "cat", None)
    more = in_other_words(plan, WORLD, ["misspelt", "paraphrase", "language"], None)
    assert more.prompts[: len(plan.prompts)] == plan.prompts
    of = lambda split: [p for p in more.prompts if p.split == split]
    assert {p.text for p in of("misspelt")} == {f"a photo of the {w}" for w in misspelt("cat")}
    assert {p.text for p in of("paraphrase")} == {"an odd cat", "cat again"}
    assert {p.text for p in of("language")} == {"una foto de un gato", "ein Foto von einer Katze"}
    for split in ("misspelt", "paraphrase", "language"):
        assert len(of(split)) == 6 and {p.concept for p in of(split)} == {"cat"}
        assert len({(p.text, p.seed) for p in of(split)}) == 6
    capped = in_other_words(ObjectTask().plan(WORLD, None, "cat", 2), WORLD, ["misspelt"], 2)
    assert [p for p in capped.prompts if p.split == "misspelt"] == of("misspelt")[:2]


def test_people_keep_their_names_in_other_languages():
    plan = CelebrityTask().plan(WORLD, None, "Ann Reed", None)
    more = in_other_words(plan, WORLD, ["language"], None)
    assert {p.text for p in more.prompts if p.split == "language"} == {
        "un retrato de Ann Reed",
        "ein Bild von Ann Reed",
    }


@pytest.mark.parametrize(
    ("task", "which", "message"),
    [
        (ObjectTask(), "mispelt", "did you mean misspelt"),
        (ObjectTask(), "language", "has none for this task"),  # nobody says airplane in these languages
        (CaptionTask(), "paraphrase", "has none for this task"),  # captions name nothing
    ],
)
def test_words_that_a_world_does_not_have_are_refused(task, which, message):
    with pytest.raises(ErasebenchError, match=message):
        in_other_words(task.plan(WORLD, None, None, None), WORLD, [which], None)


def test_kept_artists_are_asked_for_objects_where_the_world_says_which():
    counts = {**WORLD["counts"], "style": {**WORLD["counts"]["style"], "composed": 4}}
    plan = StyleTask().plan({**WORLD, "composed": ["cat", "dog"], "counts": counts}, None, None, None)
    made = {p.text: p.concept for p in plan.prompts if p.split == "composed"}
    assert made == {f"a {thing} in the style of {name}": name for thing in ("cat", "dog") for name in ("Cy", "Di")}


def test_a_brief_tells_nothing_of_what_the_evaluation_asks_for():
    plans = [ObjectTask().plan(WORLD, None, "cat", None)]
    plans += [together(plans[0], WORLD, ["dog"]), turned(plans[0], ["dog"]), shown(plans[0])]
    for plan in plans:
        told = repr(plan.brief)
        assert not any(word in told for word in WORLD["objects"]["cat"]["synonyms"])
        assert not any(p.text in told for p in plan.prompts if p.split in ("target", "synonym"))
        assert plan.concepts[0].synonyms == ("kitty", "feline", "housecat")  # for prompts, attacks and judging
