# SPDX-License-Identifier: MIT
"""Make the instructions: data/instructions/{train,eval}.jsonl, everyday prompts with rubrics.

    python data/make_instructions.py [--out DIR]

For models of half a billion parameters and more. A task (write an email, explain, plan, ...) on a topic is
joined with 1 to 5 rubrics, each said in the prompt in one of several wordings. All 25 instructions of IFEval
(arXiv:2311.07911) occur, in its schema. A fifth of the prompts has criteria that only a reader can judge;
these stand under `rubrics`. One JSON object a line:

    {"prompt": ..., "instruction_id_list": [...], "kwargs": [...], "rubrics": ["The tone is polite.", ...]}

The rubrics of a prompt do not contradict each other: ALONE and CONFLICTS name the kinds that do not go
together, and `clash` looks at their values. No task (the prompt without its rubrics) occurs twice, and a
sixth of the topics occurs in eval only. Seeded; needs nothing but the standard library, and a second.
"""

import argparse
import json
import random
import re
from collections import Counter
from pathlib import Path

SIZES = dict(train=1200, eval=240)
COUNTS = {1: 12, 2: 35, 3: 33, 4: 14, 5: 6}  # number of rubrics: weight
JUDGED = {0: 78, 1: 15, 2: 7}  # how many of these are criteria for a reader: weight


def table(text):
    """{key: [items]} of lines such as "key: item | item"; a line that begins with a space goes on."""
    lines = [line.partition(":") for line in re.sub(r"\n +", " ", text.strip()).split("\n")]
    return {key: [item.strip() for item in rest.split("|")] for key, _, rest in lines}


# ----------------------------------------------------------------------------------------------------- topics
# Pools of topics. After "=" the words that go with a topic: they become keywords and forbidden words.

TOPICS = table("""
matters: my landlord to ask for a repair of the heating = radiator winter blanket plumber warm | my manager
 to request two days of leave = project colleague handover deadline family | a hotel to book a room with a
 view of the sea = breakfast balcony arrival parking price | a neighbour to apologise for a noisy party =
 music sorry quiet evening promise | a teacher to ask for more time for an essay = illness library deadline
 effort chapter | a friend to suggest a weekend in the mountains = hiking cabin train weather lake | the city
 council to complain about a broken street light = dark safety night accident repair | an airline to claim a
 refund for a cancelled flight = ticket booking delay money airport | a colleague to explain a change in the
 project plan = budget deadline team meeting client | my cousin to announce the birth of a daughter = baby
 happy weight hospital family | a gym to cancel a membership = contract month notice account injury | a
 museum to ask about a tour for a group = guide ticket history price visit | a restaurant to praise the
 service = waiter dish evening friendly dessert | a former teacher to say thank you for years of support =
 lesson confidence career memory kindness | the library to report a lost book = card borrow replace shelf
 apology | a customer to apologise for a late delivery = package discount warehouse delay patience | my team
 to propose a weekly meeting = agenda schedule topic calendar progress | an internet provider to report a
 slow connection = router speed cable technician video | a local farmer to order vegetables for a school
 kitchen = carrot delivery price organic lunch | a dentist to move an appointment = calendar tooth morning
 sorry conflict | a recruiter to turn down a job offer = decision company salary grateful future | a
 photographer to ask about prices for a family portrait = studio album outdoor hour children | my flatmate to
 talk about sharing the housework = kitchen cleaning schedule dishes fair | a charity to offer help at
 weekends = volunteer skill food hour community
subjects: how a rainbow forms = sunlight droplet prism angle violet | why leaves change their appearance in
 autumn = pigment sugar cold daylight tree | how bread dough rises = yeast bubble flour warm oven | how
 vaccines work = immune antibody protect virus doctor | why the sea is salty = river rock mineral rain water
 | how a bicycle stays upright = balance speed steer wheel rider | how a microwave oven heats food = energy
 wave molecule plate minute | why people dream = sleep brain memory night emotion | how bees make honey =
 nectar hive flower worker wing | how the moon causes the tides = gravity ocean pull coast earth | how a bank
 earns money with loans = interest customer deposit risk savings | why prices rise over the years = inflation
 wage shop demand cost | how headphones can cancel noise = sound microphone wave quiet signal | how
 earthquakes happen = plate crust pressure fault ground | why onions make people cry = chemical tears knife
 kitchen cell | how a refrigerator keeps food cold = heat pump pipe motor milk | how paper is recycled =
 fibre pulp waste machine tree | why cats purr = throat calm kitten muscle sound | how plants turn light into
 food = leaf oxygen sugar carbon root | how a phone finds its position = satellite clock orbit distance
 signal | how an election works = vote party candidate ballot citizen | how volcanoes erupt = magma lava
 crater pressure smoke | why the sky looks blue = sunlight scatter atmosphere evening molecule | how a search
 engine finds pages = index query link rank website
products: a foldable bicycle = wheel frame ride city pedal | a cordless vacuum cleaner = battery carpet dust
 filter quiet | a pair of waterproof hiking boots = trail rain comfort leather ankle | an electric kettle
 made of glass = boil water steam handle minute | a solar phone charger = sunlight cable battery panel
 camping | a weighted blanket = sleep warm heavy fabric relax | a robot lawn mower = garden grass blade
 silent weekend | a travel backpack with ten pockets = zip strap laptop space weight | a smart watch for
 swimmers = pool screen strap heart battery | a manual coffee grinder = beans aroma handle fresh kitchen | a
 set of ceramic kitchen knives = sharp blade vegetable handle drawer | a pair of wireless headphones = music
 bass battery comfort noise | a night lamp shaped like a moon = bedtime dark glow gentle child | a compact
 tent for two people = camping rain pole light night | a bread maker = dough flour loaf crust morning | an
 adjustable standing desk = office height posture motor wood | a water bottle with a filter = plastic clean
 sport drink leak | a garden hose that never twists = water plant tap pressure length | an e-book reader =
 page screen library light battery | a board game about trains = player card route dice family | a yoga mat
 made of cork = grip stretch floor natural roll | a digital picture frame = photo family memory screen gift |
 an air fryer = crispy oven basket healthy potato | a bird feeder with a camera = seed garden photo window
 feather
activities: learning to play the guitar = chord practice song string teacher | growing tomatoes on a balcony
 = plant soil sunlight seed harvest | saving money on groceries = budget coupon price discount kitchen |
 training for a first marathon = shoes distance rest energy coach | moving to a new flat = boxes truck
 neighbour furniture landlord | adopting a dog from a shelter = walk food patience vet leash | learning a new
 language at home = vocabulary grammar podcast lesson daily | organising a garage sale = price table sign
 neighbour cash | cooking for guests on a weeknight = recipe oven dessert prepare wine | keeping a diary =
 pen evening thought habit memory | reducing plastic waste at home = bottle reuse shop container refill |
 preparing for a job interview = handshake company salary suit experience | sleeping better = bedroom routine
 screen pillow relax | starting a book club = novel discuss member meeting author | camping with small
 children = tent fire snack weather blanket | repairing a flat bicycle tyre = tube pump patch wheel lever |
 speaking in front of an audience = voice breathe practice nervous slide | decorating a small bedroom = paint
 shelf light furniture curtain | travelling through Europe by train = ticket station luggage window border |
 giving up sugar for a month = sweet fruit snack craving drink | building a birdhouse = wood nail roof hammer
 paint | taking better photos with a phone = light angle focus camera subject | learning to swim as an adult
 = pool breathe float coach water | spending less time on the phone = screen habit message hobby evening
occasions: a housewarming party = guest music kitchen dinner evening | a school reunion = classmate memory
 teacher photo dance | a retirement party for a colleague = career gift office cake wish | a summer barbecue
 = grill garden drink salad sunny | a wedding in the countryside = bride barn dance flower ring | a pirate
 birthday party = treasure ship cake costume map | a charity run = mile donate team hospital shoes | a book
 launch = author novel signing reader wine | a neighbourhood clean-up day = gloves trash street team park | a
 chess tournament = board prize player strategy opponent | a ninetieth birthday = family candle grandson love
 cake | a graduation ceremony = student diploma future proud effort | a pottery workshop = clay wheel bowl
 teacher hands | a winter film night = popcorn blanket screen sofa snack | an open day at a fire station =
 truck helmet ladder children uniform | a village music festival = band stage dance ticket food | an
 exhibition of local painters = gallery canvas brush opening portrait | a company anniversary = team founder
 success history future
places: a small harbour town = boat fish gull wave rope | an old library in the city centre = book shelf dust
 lamp silence | a night market = lantern spice crowd music stall | a mountain hut in winter = snow fire stove
 window pine | a desert oasis = palm sand camel water shade | an abandoned railway station = track clock rust
 bench ticket | a rooftop garden = flower skyline bench tomato breeze | a waterfall in the jungle = mist rock
 parrot green river | a fishing village on a lake = nets boat pier cabin trout | a castle that has become a
 hotel = tower stone knight garden bedroom | a street full of bakeries = bread smell butter morning queue | a
 botanical garden = orchid greenhouse path pond cactus | an amusement park by the sea = wheel ticket laughter
 candy sand | an island with a lighthouse = storm rock boat cliff keeper | a vineyard in autumn = grape
 barrel hill harvest cellar | a village at the foot of a volcano = smoke crater lava goat stone | a cave with
 an underground lake = torch echo rope stone dark | a science museum for children = robot rocket button
 dinosaur experiment
plots: a lighthouse keeper who finds a message in a bottle = island tide storm lamp sailor | a baker who
 loses her sense of taste = bread oven doctor sugar customer | a robot that wants to learn to paint = brush
 gallery artist wire canvas | a woman who inherits a circus = tent elephant debt clown ticket | a taxi driver
 who meets a time traveller = clock future street passenger year | a boy who can talk to pigeons = roof
 feather secret city bread | a detective who is afraid of the dark = lamp night clue mystery thief | an old
 clockmaker with one last order = gear workshop watch hands gold | a girl who builds a boat in the desert =
 sand sail wood rain dream | a librarian who discovers a hidden room = door shelf dust candle silence | a
 football coach with the worst team of the league = goal match training victory laugh | a cat that crosses
 the country by train = station ticket whisker conductor window | a gardener who grows a flower that sings =
 melody seed village rain petal | a pilot who lands on the wrong island = runway palm radio fuel stranger | a
 teacher on her first day at a mountain school = snow pupil chalk bell stove | a cook who has to feed a king
 = palace soup crown spice kitchen | a postman who delivers a letter thirty years late = mailbox love apology
 envelope door | an astronaut who misses the smell of rain = orbit window planet memory cloud | a musician
 who finds a violin in the street = melody string concert repair night | a shepherd who befriends a wolf =
 sheep mountain winter trust fire | a student who swaps places with her twin = mirror exam secret mistake
 laugh | a nurse at a hospital for toys = bandage teddy stitch repair children
questions: Is a tomato a fruit? | Can penguins fly? | Is the moon larger than the earth? | Do fish sleep? |
 Is honey made by bees? | Should children have a phone at the age of six? | Can people live on Mars today? |
 Is Paris the capital of France? | Is it healthy to drink water every day? | Will robots replace teachers? |
 Is a whale a mammal? | Do cats lay eggs? | Should every town have a library? | Is ice lighter than water? |
 Can dogs see in the dark? | Is a spider an insect? | Is it wise to buy a car without a test drive? | Are
 bananas yellow when they are ripe? | Do plants need light? | Is chess a sport? | Can you hear sound in empty
 space? | Should shops be open on Sundays? | Does the sun rise in the west? | Is it safe to eat raw potatoes?
 | Is gold heavier than wood? | Will it be possible to talk to animals one day? | Is bread usually baked in
 an oven? | Do all birds migrate in winter? | Is reading before bed a good habit? | Can a person learn to
 swim at the age of seventy? | Is English spoken in Australia? | Do spiders have eight legs? | Should
 homework be abolished? | Is the Sahara a desert? | Is coffee made from beans? | Can snakes hear music?
""")

# ------------------------------------------------------------------------------------------------------ tasks
# A task: its pool of topics {t}, what it asks for, the kinds of rubrics it takes besides COMMON. Then ways to
# ask, details {x}, phrases to end with, and criteria to judge, each "= the sentence that asks for it".

TASKS = table("""
email: matters | email | number_placeholders | postscript | number_sentences | number_paragraphs
email ask: I am {x}. Write an email to {t}. | Write an email to {t}. I am {x}. | As {x}, I need an email to
 {t}. | Help me write an email to {t}. You can mention that I am {x}. | I am {x}. Could you draft an email to
 {t}?
email x: a student | a nurse | a young parent | a musician | a bus driver | a software developer
email end: I look forward to your reply. | Thank you for your time. | Please let me know what you think. |
 Have a lovely day!
email judge: The email has a subject line. = Give it a subject line. | The tone is polite and warm. = Keep a
 polite and warm tone. | The email names a concrete date. = Name a concrete date. | The email gives a reason
 for its request or message. = Give a reason for what I write. | The email names a clear next step. = Name a
 clear next step.
explanation: subjects | explanation | PROSE | OUTLINE | title | json_format
explanation ask: Explain {t} to {x}. | Help me explain {t} to {x}. | Can you explain {t} in words that {x}
 would understand? | I have to explain {t} to {x}. Write what I could say. | Write an explanation of {t} for
 {x}.
explanation x: a ten-year-old | my grandmother | a class of beginners | a curious colleague | someone who
 never liked science | a visitor to a museum
explanation end: I hope this makes it clear. | And that is how it works. | Now you know the basics. | Ask me
 if anything is unclear.
explanation judge: The explanation uses an analogy from everyday life. = Use an analogy from everyday life. |
 The explanation avoids technical jargon or explains it. = Explain any technical term that you use. | The
 explanation corrects a common misunderstanding. = Correct a common misunderstanding about it. | The
 explanation asks the reader at least one question. = Ask the reader a question somewhere. | The explanation
 goes through the process step by step. = Go through it step by step.
summary: subjects | summary | PROSE | OUTLINE | title | json_format
summary ask: Summarise {t} for {x}. | Write a summary of {t} for {x}. | I need a summary of {t} for {x}. |
 Sum up {t}. The text is for {x}. | Put together a summary for {x}. It is about {t}.
summary x: a school newsletter | a website for families | a science club | a poster in a library | a pocket
 guide
summary end: There is always more to discover. | That is the whole idea. | These are the main points. | The
 rest is detail.
summary judge: The summary opens with its most important point. = Open with the most important point. | The
 summary gives at least one example. = Give an example. | The summary is neutral in tone. = Keep a neutral
 tone. | The summary says why the subject matters in daily life. = Say why this matters in daily life.
review: products | review | PROSE | OUTLINE | title | json_format
review ask: Write a review of {t} by {x}. | Review {t} from the point of view of {x}. | Pretend to be {x} and
 review {t}. | I am {x} and I bought {t}. Write my review. | Write the review that {x} would leave after
 buying {t}.
review x: a busy parent | a retired teacher | a student on a budget | a demanding engineer | a frequent
 traveller
review end: I would buy it again. | Decide for yourself. | My search is over. | I have no regrets.
review judge: The review mentions at least one drawback. = Mention at least one drawback. | The review gives
 a rating in numbers. = Give a rating out of five stars. | The review says who should buy the product. = Say
 who should buy it. | The review describes a concrete situation of use. = Describe a concrete situation of
 use. | The review compares the product with something else. = Compare it with something else.
product text: products | text | OUTLINE | number_sentences | number_placeholders | title | json_format
product text ask: Write a product description of {t} for {x}. | Write an advertisement for {t}. It is meant
 for {x}. | I sell {t}. Write the text for {x}. | We need a sales text for {x}. The product is {t}. | Write a
 persuasive text about {t} for {x}.
product text x: an online shop | a printed catalogue | a newspaper page | a window display | a company
 website
product text end: Order yours today! | Try it for thirty days. | You deserve it. | Available now in our shop.
product text judge: The text is enthusiastic. = Sound enthusiastic. | The text names a price. = Name a price.
 | The text contains a call to action. = Include a call to action. | The text names at least two benefits for
 the buyer. = Name at least two benefits for the buyer. | The text addresses the reader directly. = Address
 the reader directly.
plan: activities | plan | OUTLINE | number_sentences | title | json_format
plan ask: Make a plan for {t}. It is for {x}. | Write a plan for {x} who is interested in {t}. | Plan the
 first steps of {t} for {x}. | I need a plan for {t} that suits {x}. | What would a good plan for {t} look
 like? It has to suit {x}.
plan x: a complete beginner | a busy student | someone with little money | a cautious person | an impatient
 person
plan end: Good luck with it! | One step at a time. | Adjust it as you go. | Start today.
plan judge: The plan says how much time at least one step takes. = Say how long the steps take. | The plan
 names something that could go wrong. = Name something that could go wrong. | The steps of the plan are in a
 sensible order. = Put the steps in a sensible order. | The plan mentions a way to measure progress. =
 Mention a way to measure progress.
tips: activities | list of tips | OUTLINE | title | json_format
tips ask: List tips on {t} for {x}. | Give me a list of tips on {t} for {x}. | What are your best tips on
 {t}? They are for {x}. | Collect useful tips for {x} on {t}. | My audience is {x}. Write a list of tips on
 {t}.
tips x: beginners | busy people | teenagers | people over sixty | people on a budget
tips end: Have fun! | Practice makes perfect. | Share these ideas with a friend. | You can do this!
tips judge: At least one tip is free of charge to follow. = Make sure that at least one tip costs nothing. |
 Each tip is followed by a reason or an explanation. = Give a reason for each tip. | The tips begin with the
 easiest one. = Begin with the easiest tip. | The tone is encouraging. = Sound encouraging.
advice: activities | answer | PROSE | OUTLINE
advice ask: What advice would you give to {x} about {t}? | Give advice to {x} about {t}. | {x} asked me about
 {t}. What should I say? | How would you advise {x} when it comes to {t}? | I want to give advice about {t}
 to {x}. What can I say?
advice x: my best friend | my younger sister | my father | my new neighbour | a shy colleague
advice end: I hope this helps. | Take your time. | Trust yourself. | It will be worth it.
advice judge: The advice begins with words of encouragement. = Begin with words of encouragement. | The
 advice warns of a common mistake. = Warn of a common mistake. | The advice includes a personal story. = Tell
 a personal story. | The advice suggests something to do today. = Suggest something that can be done today.
invitation: occasions | invitation | number_placeholders | postscript | number_sentences | number_paragraphs
 | title
invitation ask: Write an invitation to {t} for {x}. | Invite {x} to {t}. | We are planning {t}. Write the
 invitation for {x}. | I want to invite {x} to {t}. Write the text. | Help me invite {x} to {t}.
invitation x: my neighbours | my old friends | my colleagues | the whole family | the members of our club
invitation end: We hope to see you there! | Please reply soon. | Bring a friend! | It will be a day to
 remember.
invitation judge: The invitation gives a date and a time. = Give a date and a time. | The invitation says
 where to go. = Say where it takes place. | The invitation says what to bring or to wear. = Say what to bring
 or to wear. | The invitation asks for a reply. = Ask for a reply. | The invitation sounds cheerful. = Sound
 cheerful.
speech: occasions | speech | PROSE | number_placeholders | multiple_sections
speech ask: Write a speech for {t}. The speaker is {x}. | I am {x} and have to speak at {t}. Write my speech.
 | Imagine that {x} speaks at {t}. Write the speech. | Write the opening speech that {x} gives at {t}.
speech x: the mayor | an old friend of the host | a nervous organiser | a proud parent | a local teacher
speech end: Thank you all for coming. | Let us celebrate! | The floor is yours. | Enjoy the day!
speech judge: The speech thanks someone. = Thank someone by name. | The speech contains a joke or a humorous
 remark. = Include a joke. | The speech greets the audience at the beginning. = Greet the audience at the
 beginning. | The speech tells a small anecdote. = Tell a small anecdote.
description: places | description | PROSE | number_highlighted_sections | title
description ask: Describe {t} {x}. | Write a description of {t} {x}. | I need a description of {t} {x}. |
 Paint {t} in words {x}.
description x: for a travel magazine | as a painter would see it | for a novel | for a radio programme | as a
 child would see it
description end: Nothing else moves. | It stays with you. | Come and see it. | Time stands still here.
description judge: The description appeals to at least two senses. = Appeal to at least two of the senses. |
 The description contains a comparison or a metaphor. = Use a comparison or a metaphor. | The description
 mentions at least one person or animal. = Let a person or an animal appear. | The description mentions the
 time of day. = Mention the time of day.
postcard: places | postcard | postscript | number_sentences
postcard ask: Write a postcard to {x} from {t}. | I am visiting {t}. Write a postcard to {x}. | Compose a
 postcard from {t} to {x}. | What could I write on a postcard to {x} from {t}?
postcard x: my parents | my best friend | an old teacher | my little brother | my colleagues
postcard end: Wish you were here! | See you soon! | More when I am back. | Love to everyone!
postcard judge: The postcard mentions the weather. = Mention the weather. | The postcard mentions something
 to eat or drink. = Mention something to eat or drink. | The postcard asks the reader a question. = Ask a
 question.
guide: places | guide | OUTLINE | number_sentences | number_paragraphs | title | json_format
guide ask: Write a visitor's guide to {t} for {x}. | Write a travel guide to {t}. It is for {x}. | Guide {x}
 on a visit to {t}. | Plan a visit to {t} for {x}. | What should {x} see and do at {t}? Write a guide.
guide x: families with children | travellers on a budget | older visitors | young couples | a group of
 students
guide end: Enjoy your visit! | Come back soon. | Take only pictures with you. | You will love it.
guide judge: The guide warns of something to avoid. = Warn of something to avoid. | The guide recommends a
 time of day or a season. = Recommend the best time to come. | The guide suggests something to eat. = Suggest
 something to eat. | The guide says how to get there. = Say how to get there. | The guide mentions what it
 costs. = Mention the costs.
story: plots | story | PROSE | title | multiple_sections
story ask: Write a story about {t}. {x} | Tell me a story about {t}. {x} | Write a tale of {t}. {x} | I would
 like to read a story about {t}. {x}
story x: It takes place in a single night. | It should have a surprising ending. | It should suit young
 children. | It is set in a small town. | It should have a happy ending. | Let it begin with a knock at the
 door.
story end: And so it began. | Nobody ever found out. | The rest is history. | It was worth the wait.
story judge: The main character has a name. = Give the main character a name. | The story is told in the
 first person. = Tell it in the first person. | The story contains direct speech. = Include some direct
 speech. | The main character learns something. = Let the main character learn something. | The story
 contains a moment of humour. = Include a moment of humour.
diary entry: plots | diary entry | PROSE | postscript
diary entry ask: Write a diary entry by {t}. It is about {x}. | Imagine the diary of {t}. Write the entry
 about {x}. | What would {t} write in a diary about {x}? Write the entry. | Write about {x} as a page from
 the diary of {t}.
diary entry x: the strangest day of the year | a day full of rain | a visit from an old friend | a small
 victory | a sleepless night
diary entry end: I should sleep now. | Tomorrow will be different. | That is all for today. | Nobody must
 know.
diary entry judge: The diary entry gives its date. = Give the date of the entry. | The diary entry describes
 the writer's feelings. = Describe what the writer feels. | The diary entry mentions a plan for the next day.
 = Mention a plan for the next day.
dialogue: plots | dialogue | number_sentences | title
dialogue ask: Write a dialogue between {t} and {x}. | Imagine a talk between {t} and {x}. Write the dialogue.
 | Write down what {t} and {x} might say to each other. | Write a scene for the stage with {t} and {x}.
dialogue x: a curious neighbour | a journalist | a stubborn old man | a child of six | an honest friend
dialogue end: They both laughed. | The end. | And then it was quiet. | They shook hands.
dialogue judge: The two speakers disagree about something. = Let the two disagree about something. | The
 dialogue ends with an agreement. = Let them agree in the end. | Each speaker speaks at least twice. = Let
 each of them speak twice.
question: questions | answer | constrained_response
question ask: {t} | Quick question: {t} | My daughter wants to know: {t} | Here is a question from a quiz:
 {t} | Tell me: {t}
question x: -
question end: -
question judge: The answer is followed by a reason. = After that, give a reason. | The answer is followed by
 an example. = Then add an example. | The response says how sure it is of the answer. = Then say how sure you
 are of it.
""")

# ---------------------------------------------------------------------------------------------------- rubrics
# A kind of rubric is an instruction of IFEval, without its group.

GROUPS = table("""
keywords: existence | frequency | forbidden_words | letter_frequency
language: response_language
length_constraints: number_sentences | number_paragraphs | number_words | nth_paragraph_first_word
detectable_content: number_placeholders | postscript
detectable_format: number_bullet_lists | number_highlighted_sections | multiple_sections | json_format
 | title | constrained_response
combination: two_responses | repeat_prompt
startend: end_checker | quotation
change_case: capital_word_frequency | english_capital | english_lowercase
punctuation: no_comma
""")
IDS = {kind: f"{group}:{kind}" for group, kinds in GROUPS.items() for kind in kinds}
KINDS = dict(  # abbreviations in TASKS
    COMMON="""existence frequency forbidden_words letter_frequency number_words response_language no_comma
    two_responses repeat_prompt end_checker quotation english_capital english_lowercase
    capital_word_frequency""".split(),
    PROSE="number_sentences number_paragraphs nth_paragraph_first_word".split(),
    OUTLINE="number_bullet_lists number_highlighted_sections multiple_sections".split(),
)
# Kinds that go with these only; then kinds that do not go together. "judge" is a criterion for a reader.
ALONE = table("""
constrained_response: judge
json_format: existence | forbidden_words
two_responses: existence | forbidden_words | response_language | title | no_comma
repeat_prompt: existence | title | no_comma
""")
CONFLICTS = table("""
response_language: existence | frequency | forbidden_words | letter_frequency | nth_paragraph_first_word
 | postscript | multiple_sections | end_checker | capital_word_frequency | english_capital
 | english_lowercase | judge
english_capital: english_lowercase | capital_word_frequency | end_checker
english_lowercase: capital_word_frequency | end_checker | postscript | multiple_sections
quotation: title | end_checker | postscript | number_bullet_lists
number_paragraphs: nth_paragraph_first_word | number_sentences | multiple_sections | postscript
 | number_bullet_lists | number_highlighted_sections
nth_paragraph_first_word: title | multiple_sections | number_bullet_lists | postscript
number_sentences: number_bullet_lists | postscript | multiple_sections
number_highlighted_sections: multiple_sections | number_bullet_lists
end_checker: postscript
number_placeholders: judge
""")
WORDINGS = table("""
existence: Include the word{s} {words}. | Use the word{s} {words} in the {noun}. | The word{s} {words} must
 appear. | Make sure that the {noun} contains the word{s} {words}. | Do not forget to use the word{s}
 {words}. | Work the word{s} {words} into the {noun}.
frequency: Use the word {words} {bound} times. | The word {words} should appear {bound} times. | Mention the
 word {words} {bound} times. | The {noun} should contain the word {words} {bound} times. | I want to read the
 word {words} {bound} times.
forbidden_words: Do not use the word{s} {either}. | Avoid the word{s} {words}. | The {noun} must not contain
 the word{s} {either}. | Leave out the word{s} {words}. | Write it without the word{s} {words}. | Never
 mention the word{s} {either}.
letter_frequency: The letter "{letter}" should appear {bound} times. | Use the letter "{letter}" {bound}
 times. | In your response, the letter "{letter}" must occur {bound} times. | Let the letter "{letter}"
 appear {bound} times in all.
response_language: Write the whole {noun} in {language}; no other language is allowed. | Answer in {language}
 only. | Your entire response should be in {language}. | Use {language} for the whole response. | Please
 respond only in {language}.
number_sentences: Write {bound} sentences. | The {noun} should have {bound} sentences. | Use {bound}
 sentences in all. | Your response should contain {bound} sentences. | Make it {bound} sentences in length.
number_paragraphs: Write exactly {n} paragraphs, separated by the markdown divider ***. | There should be
 exactly {n} paragraphs. Separate them with ***. | Split the {noun} into {n} paragraphs with *** between
 them. | Use {n} paragraphs and put three asterisks (***) between one paragraph and the next. | The {noun}
 should have {n} paragraphs with *** between one and the next.
number_words: Write {bound} words. | The {noun} should have {bound} words. | Answer with {bound} words. | Use
 {bound} words in all. | Your response should contain {bound} words. | The length of the {noun} should be
 {bound} words.
nth_paragraph_first_word: Write exactly {n} paragraphs, separated by a blank line. The {nth} paragraph must
 start with the word "{first}". | There should be {n} paragraphs with two line breaks between them, and
 paragraph {k} must begin with the word "{first}". | Use {n} paragraphs, divided by two new lines and by
 nothing else. The first word of paragraph {k} must be "{first}". | Divide the {noun} into {n} paragraphs (an
 empty line between them), and start the {nth} one with the word "{first}".
number_placeholders: Include {min} placeholder{s} in square brackets, such as [address]. | Use {min}
 placeholder{s} in square brackets, like [name]. | The {noun} must contain {min} placeholder{s} represented
 by square brackets, such as [date]. | Leave {min} placeholder{s} for details that I will fill in, each in
 square brackets, as in [place].
postscript: Add a postscript that starts with {marker} | At the end of the {noun}, add a postscript starting
 with {marker} | Close with a postscript. It must begin with {marker} | After the {noun}, put a postscript
 marked {marker} | Do not forget a postscript at the end; start it with {marker}
number_bullet_lists: Use exactly {n} bullet points, each on a line of its own that starts with "* ". | The
 {noun} must contain exactly {n} markdown bullet points, such as: * This is a point. | Give exactly {n}
 bullet points in markdown, like this: * My point. | Put the main ideas into exactly {n} bullets that start
 with an asterisk (*). | There should be {n} bullet points, no more and no fewer, each marked with * at the
 start of a line.
constrained_response: Answer with one of these options: "My answer is yes.", "My answer is no.", "My answer
 is maybe." | Choose your answer from the following: My answer is yes. / My answer is no. / My answer is
 maybe. | Reply with one of these sentences: "My answer is yes." or "My answer is no." or "My answer is
 maybe." | You must use one of these phrases as your answer: "My answer is yes.", "My answer is no." or "My
 answer is maybe."
number_highlighted_sections: Highlight {min} section{s} of the {noun} with markdown, as in *highlighted
 section*. | Mark {min} passage{s} like this: *highlighted section*. | Highlight {min} part{s} of your
 response with single asterisks, such as *this part*. | The {noun} must contain {min} highlighted section{s}
 in markdown, i.e. *highlighted section*. | Emphasise {min} phrase{s} with asterisks: *highlighted phrase*.
multiple_sections: Divide the {noun} into {n} sections. Head each with {splitter} and its number, as in
 {splitter} 1. | The {noun} must have {n} sections. Mark the beginning of each with {splitter} X, such as
 {splitter} 1. | Write {n} sections that begin with {splitter} 1, {splitter} 2 etc. | Number the {n} sections
 of the {noun} from "{splitter} 1" to "{splitter} {n}". | Structure the {noun} in {n} sections, each of which
 starts with "{splitter}" and its number, for example "{splitter} 1".
json_format: Wrap the entire output in JSON format. | Your whole response must be valid JSON; markdown ticks
 such as ``` are allowed. | Answer with a single JSON object and nothing else. | Format the complete {noun}
 as JSON. | Return the {noun} as valid JSON only.
title: Give the {noun} a title, wrapped in double angular brackets, such as <<title>>. | Add a title in the
 form <<title>>. | The {noun} must have a title in double angular brackets, i.e. <<title>>. | It needs a
 title that is written as <<title>>. | Write a title in double angle brackets, like <<my title>>.
two_responses: Give two different responses, separated by six asterisks (******). | Write two different
 versions of the {noun} with ****** between them. | I would like two different answers. Put six asterisk
 symbols (******) between them and nowhere else. | Offer two versions that differ. Separate them, and only
 them, with ******.
repeat_prompt: First repeat the request above word for word, then give your answer. Do not say anything
 before you repeat it, and do not repeat this sentence. | Before you answer, copy the first paragraph of this
 message without any change. Nothing may stand before it. | Begin your response with the exact text of the
 request above (without this sentence); the {noun} comes after it. | Start by repeating the first paragraph
 of this message word for word. Only then write the {noun}.
end_checker: End with exactly this sentence: "{phrase}" Nothing may follow it. | Finish your response with
 this exact phrase: "{phrase}" | The very last words must be "{phrase}" | The {noun} must end with "{phrase}"
 and no other words may follow. | Close with the words "{phrase}" and add nothing after them.
quotation: Wrap your entire response in double quotation marks. | Put the whole {noun} in double quotation
 marks. | Begin and end your response with a double quotation mark ("). | Enclose everything you write in
 double quotes. | The first and the last character of your response must be a double quotation mark.
capital_word_frequency: Use words in all capital letters {bound} times. | Words in all capital letters should
 appear {bound} times. | Write {bound} of the words in CAPITAL letters. | The {noun} should contain {bound}
 words that are written in all capitals.
english_capital: Write in English and in capital letters only. | Your entire response should be in English,
 in all capital letters. | Use only capital letters, and answer in English. | Please write the whole {noun}
 in English CAPITAL LETTERS. | No lowercase letters are allowed; write in English.
english_lowercase: Write in English and in lowercase letters only. | Your entire response should be in
 English, in all lowercase letters. | Use no capital letters at all, and answer in English. | Please write
 the whole {noun} in English and in lowercase. | No capital letters are allowed; write in English.
no_comma: Do not use any commas. | Write without commas. | There must be no comma in your response. | Refrain
 from using commas. | Please avoid commas altogether. | Your {noun} should not contain a single comma.
""")
AT_LEAST = ["at least {n}", "at least {n}", "no fewer than {n}", "a minimum of {n}"]
LESS_THAN = ["less than {n}", "fewer than {n}"]
JOINED = dict(words="and", either="or")
CODES = "es fr de it pt ru ja ko hi ar pl fi vi".split()
NAMES = (
    "Spanish French German Italian Portuguese Russian Japanese Korean Hindi Arabic Polish Finnish Vietnamese"
)
LANGUAGES = dict(zip(CODES, NAMES.split()))
FIRST_WORDS = "today when perhaps every although many some there after nothing".split()
PLAIN_WORDS = "very really good great just always nice thing because".split()  # to forbid on any topic
SPLITTERS = dict(story=["Chapter", "CHAPTER", "Part"], plan=["Step", "Section", "SECTION"], guide=["Part"])
BOUNDS = dict(  # the names of the number and of the relation; the numbers for "at least" and for "less than"
    frequency=("frequency", "relation", [2, 2, 3, 4], [2, 3, 4]),
    number_sentences=("num_sentences", "relation", [3, 4, 5, 6, 8, 10], [4, 5, 6, 8, 10]),
    number_words=("num_words", "relation", [40, 50, 60, 80, 100, 150, 200], [50, 60, 80, 100, 120, 200]),
    capital_word_frequency=("capital_frequency", "capital_relation", [2, 3, 4, 5], [4, 5, 6, 8]),
)
# The other numbers: name, choices, and about how many words each such thing takes.
NUMBERS = dict(
    number_paragraphs=("num_paragraphs", [2, 3, 3, 4, 5], 12),
    nth_paragraph_first_word=("num_paragraphs", [2, 3, 3, 4], 12),
    number_placeholders=("num_placeholders", [1, 2, 3, 4], 5),
    number_bullet_lists=("num_bullets", [2, 3, 3, 4, 5, 6], 9),
    number_highlighted_sections=("num_highlights", [1, 2, 3, 4], 5),
    multiple_sections=("num_sections", [2, 3, 3, 4], 14),
)
# letter: its share in English text in percent. The rare ones are bounded from above.
LETTERS = dict(c=2.8, d=4, f=2.2, g=2, h=6, m=2.4, p=1.9, w=2.4, y=2)
LETTERS |= dict(b=1.5, k=0.8, v=1, j=0.15, q=0.1, x=0.15, z=0.07)
WEIGHTS = dict(two_responses=1.8, repeat_prompt=2.4, json_format=5, response_language=1.6, postscript=2.5)
WEIGHTS |= dict(number_placeholders=2.5, multiple_sections=1.8, number_bullet_lists=2, number_paragraphs=1.5)
WEIGHTS |= dict(nth_paragraph_first_word=2.5, number_highlighted_sections=1.6, english_lowercase=1.2)


def together(a, b):
    """Whether two kinds of rubrics may stand in one prompt."""
    for one, other in ((a, b), (b, a)):
        if one in ALONE and other not in ALONE[one] or other in CONFLICTS.get(one, []):
            return False
    return True


def draw_kinds(allowed, count, judged, rng):
    """`count` allowed kinds that go together, and with criteria if there are any; None if stuck."""
    kinds, left = [], [kind for kind in allowed if not judged or together(kind, "judge")]
    while len(kinds) < count:
        left = [kind for kind in left if kind not in kinds and all(together(kind, other) for other in kinds)]
        if not left:
            return None
        kinds += rng.choices(left, [WEIGHTS.get(kind, 1) for kind in left])
    return sorted(kinds, key=lambda kind: kind != "repeat_prompt")  # it refers to the text above it


def draw_kwargs(kind, task, base, words, rng):
    """IFEval's arguments for one rubric. Words of the topic are taken out of the list `words`."""
    if kind in BOUNDS:
        name, relation, least, less = BOUNDS[kind]
        chosen = rng.choice(["at least", "at least", "less than"])
        bound = {name: rng.choice(least if chosen == "at least" else less), relation: chosen}
        return {"keyword": words.pop(), **bound} if kind == "frequency" else bound
    if kind == "letter_frequency":
        letter = rng.choice(list(LETTERS))
        share, relation = LETTERS[letter], "at least" if LETTERS[letter] > 1.5 else "less than"
        n = rng.choice([4, 5, 6, 8, 10] if share > 1.5 else [6, 8, 10] if share > 0.5 else [2, 3, 4])
        return {"letter": letter, "let_frequency": n, "let_relation": relation}
    kwargs = {NUMBERS[kind][0]: rng.choice(NUMBERS[kind][1])} if kind in NUMBERS else {}
    if kind == "existence":
        kwargs = {"keywords": [words.pop() for _ in range(rng.choice([1, 2, 2, 3]))]}
    elif kind == "forbidden_words":
        a, b = rng.sample(PLAIN_WORDS, 2)
        kwargs = {"forbidden_words": [a, b] if rng.random() < 0.3 else [words.pop(), *rng.choice([[], [a]])]}
    elif kind == "nth_paragraph_first_word":
        kwargs["nth_paragraph"] = rng.randint(1, kwargs["num_paragraphs"])
        kwargs["first_word"] = rng.choice(FIRST_WORDS)
    elif kind == "multiple_sections":
        kwargs |= {"section_spliter": rng.choice(SPLITTERS.get(task, ["Section", "SECTION", "Part"]))}
    elif kind == "postscript":
        kwargs = {"postscript_marker": rng.choice(["P.S.", "P.S.", "P.P.S"])}
    elif kind == "response_language":
        kwargs = {"language": rng.choice(CODES[: rng.choice([5, 13])])}
    elif kind == "end_checker":
        kwargs = {"end_phrase": rng.choice(TASKS[f"{task} end"])}
    elif kind == "repeat_prompt":
        kwargs = {"prompt_to_repeat": base}
    return kwargs


def number(kwargs):
    """The bound among the arguments of a rubric; 0 if it has none."""
    return next((value for value in kwargs.values() if type(value) is int), 0)


def say(kind, kwargs, noun, rng):
    """The sentence of the prompt that asks for the rubric."""
    n, nth = number(kwargs), kwargs.get("nth_paragraph", 1)
    words = kwargs.get("keywords") or kwargs.get("forbidden_words") or [kwargs.get("keyword", "")]
    quote = rng.choice(['"', '"', ""])
    *front, back = [f"{quote}{word}{quote}" for word in words]
    slots = dict(noun=noun, n=n, s="s" if max(n, len(words)) > 1 else "")
    slots |= {name: f"{', '.join(front)} {last} {back}" if front else back for name, last in JOINED.items()}
    slots |= dict(k=nth, nth=["first", "second", "third", "fourth"][nth - 1], first=kwargs.get("first_word"))
    slots |= dict(bound=rng.choice(LESS_THAN if "less than" in kwargs.values() else AT_LEAST).format(n=n))
    slots |= dict(min=rng.choice(AT_LEAST).format(n=n), marker=kwargs.get("postscript_marker"))
    slots |= dict(letter=kwargs.get("letter"), phrase=kwargs.get("end_phrase"))
    slots |= dict(splitter=kwargs.get("section_spliter"), language=LANGUAGES.get(kwargs.get("language")))
    sentence = rng.choice(WORDINGS[kind]).format(**slots)
    return sentence + "." if sentence.endswith("P.P.S") else sentence


def words_needed(rubrics, judged):
    """A generous guess at how many words a response takes that meets the rubrics (kind: kwargs)."""
    need = 20 + 15 * judged
    for kind, kwargs in rubrics.items():
        n, least = number(kwargs), "at least" in kwargs.values()
        if kind == "number_words":
            need = max(need, n * least)
        elif kind == "letter_frequency":
            need += n * least * 22 / LETTERS[kwargs["letter"]]
        elif kind in BOUNDS:
            need += n * least * (7 if kind == "number_sentences" else 5)
        else:
            need += n * NUMBERS[kind][2] if kind in NUMBERS else 8
    return need


def clash(rubrics, base, judged):
    """Whether the values of the rubrics (kind: kwargs) contradict one another, or the task."""
    given = {name: value for kwargs in rubrics.values() for name, value in kwargs.items()}
    below = {kind: number(kwargs) for kind, kwargs in rubrics.items() if "less than" in kwargs.values()}
    need, keyword = words_needed(rubrics, judged), given.get("keyword", "")
    phrase, splitter = given.get("end_phrase", "").lower(), given.get("section_spliter", "")
    due = [*given.get("keywords", []), phrase, given.get("first_word", ""), splitter]
    text = " ".join([*due, *[keyword] * given.get("frequency", 0)]).lower()
    rare, sentences = rubrics.get("letter_frequency", {}).get("letter"), below.get("number_sentences", 99)
    letters = below.get("letter_frequency", 999)
    return any(
        [
            "no_comma" in rubrics and "," in given.get("prompt_to_repeat", ""),
            any(word in f"{text} {base.lower()}" for word in given.get("forbidden_words", [])),
            keyword and any(keyword in part.lower() or part and part.lower() in keyword for part in due),
            any(word in phrase for word in given.get("keywords", [])),  # it would be met by the other
            rare and (text.count(rare) * 2 > letters or need * 0.07 * LETTERS[rare] > letters),
            need > 0.8 * below.get("number_words", 400) or need > 13 * (sentences - 1),
            given.get("num_paragraphs", 0) >= sentences,
            "capital_word_frequency" in below and splitter.isupper(),
            "english_capital" in rubrics and splitter.istitle(),
            given.get("language") in ("ja", "hi") and {"number_words", "number_sentences"} & set(rubrics),
        ]
    )


def layout(base, said, rng):
    """Join the task and the sentences that ask for its rubrics."""
    if len(said) > 1 and rng.random() < 0.35:
        marks = rng.choice([["-"] * 5, ["1.", "2.", "3.", "4.", "5."]])
        lines = "\n".join(f"{mark} {sentence}" for mark, sentence in zip(marks, said))
        head = rng.choice(["Please follow these rules:", "Requirements:", "Keep to these rules:"])
        return rng.choice([f"{base}\n\n{head}\n{lines}", f"{head}\n{lines}\n\nThe task: {base}"])
    text = " ".join(said)
    forms = [f"{base} {text}", f"{base} {text}", f"{base}\n\n{text}", f"{text}\n\n{base}"]
    return rng.choice([*forms, "\n".join([base, *said]), " ".join([said[0], base, *said[1:]])])


def make_row(task, count, judged, unseen, taken, rng):
    """A row of data with `count` rubrics, its task not in `taken`; None if what is drawn does not fit."""
    pool, noun, *extra = TASKS[task]
    question = pool == "questions"
    topics = [topic for i, topic in enumerate(TOPICS[pool]) if (i % 6 == 5) == unseen]
    topic, _, words = rng.choice(topics).partition(" = ")
    base = rng.choice(TASKS[f"{task} ask"]).format(t=topic, x=rng.choice(TASKS[f"{task} x"]))
    base = base[0].upper() + base[1:]
    allowed = [kind for name in [*extra, *["COMMON"] * (not question)] for kind in KINDS.get(name, [name])]
    kinds = draw_kinds(allowed, count - judged, judged, rng)
    words = [word for word in rng.sample(words.split(), len(words.split())) if word not in base.lower()]
    if base in taken or not kinds or len(words) < 5 and not question:
        return None
    try:
        rubrics = {kind: draw_kwargs(kind, task, base, words, rng) for kind in kinds}
    except IndexError:  # no words left
        return None
    if clash(rubrics, base, judged):
        return None
    taken.add(base)
    said = [say(kind, kwargs, noun, rng) for kind, kwargs in rubrics.items()]
    criteria = [item.split(" = ") for item in rng.sample(TASKS[f"{task} judge"], judged)]
    said += [asked for _, asked in criteria]
    first = question or "repeat_prompt" in kinds  # the task stands first, in a paragraph of its own
    row = dict(prompt="\n\n".join([base, " ".join(said)]) if first else layout(base, said, rng))
    row |= dict(instruction_id_list=[IDS[kind] for kind in kinds], kwargs=list(rubrics.values()))
    return row | (dict(rubrics=[criterion for criterion, _ in criteria]) if criteria else {})


def make_split(split, taken, rng):
    """The rows of train or eval. Half of eval, and none of train, is about the topics kept for eval."""
    rows, tasks = [], [name for name in TASKS if f"{name} ask" in TASKS and name != "question"]
    while len(rows) < SIZES[split]:
        question = rng.random() < 0.05
        count = rng.choice([1, 2]) if question else rng.choices(list(COUNTS), COUNTS.values())[0]
        judged = count - 1 if question else min(count - 1, rng.choices(list(JUDGED), JUDGED.values())[0])
        row = None
        while row is None:
            unseen = split == "eval" and (question or rng.random() < 0.5)
            row = make_row("question" if question else rng.choice(tasks), count, judged, unseen, taken, rng)
        rows.append(row)
    return rows


def main():
    """Write both files and print how often each kind occurs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "instructions")
    out, rng, taken = parser.parse_args().out, random.Random(0), set()
    out.mkdir(parents=True, exist_ok=True)
    for split, size in SIZES.items():
        rows = make_split(split, taken, rng)
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{split}.jsonl").write_text(text, encoding="utf-8")
        counts = Counter(len(row["kwargs"]) + len(row.get("rubrics", [])) for row in rows)
        print(f"{split}: {size} prompts; number of rubrics: prompts: {dict(sorted(counts.items()))}")
        print(f"with criteria for a reader: {sum('rubrics' in row for row in rows)}")
        kinds = Counter(kind for row in rows for kind in row["instruction_id_list"])
        print("\n".join(f"  {kind:45}{n:5}" for kind, n in sorted(kinds.items())))


if __name__ == "__main__":
    main()
